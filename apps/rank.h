#pragma once

namespace phalanx::apps {

// A rank process: `phalanx rank`, started by a node process only (descriptors: rank_spec.h).
// Follows its supervisor's messages: start, connect, load, allocate; then runs the step loop.
// Exit status 0 after an orderly stop.
int rank_main();

}  // namespace phalanx::apps
