#pragma once

namespace phalanx::apps {

// `phalanx hccn`, also under the name hccn_tool: the commands of the Ascend tool that scripts use, in
// its words, for the network interfaces of this machine. Results on stdout, its error texts on stderr,
// each with a line of ours where that says more. Returns its exit status.
[[nodiscard]] int hccn_main(int argc, char** argv);

}  // namespace phalanx::apps
