#pragma once

namespace phalanx::apps {

// `phalanx status`: nodes, ranks, states and load of a running instance, asked of its master's
// management plane. Returns 0 when it serves, 1 when it does not or cannot be asked, 2 for a wrong
// command line.
[[nodiscard]] int status_main(int argc, char** argv);

}  // namespace phalanx::apps
