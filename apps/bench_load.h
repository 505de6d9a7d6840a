#pragma once

namespace phalanx::apps {

// Loading a checkpoint beside plain reading of the same bytes (O_DIRECT, when the disk is the limit)
// and beside a memcpy of them (when the system has them cached).
int bench_load(int argc, char** argv);

}  // namespace phalanx::apps
