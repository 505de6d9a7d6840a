#pragma once

namespace phalanx::apps {

// `phalanx ranktable make|check|show`: argv[0] is "ranktable". Results to stdout, problems to
// stderr. Returns the exit status: 0, 1 for a bad table or input, 2 for a wrong command line.
[[nodiscard]] int ranktable_main(int argc, char** argv);

}  // namespace phalanx::apps
