#pragma once

#include <cstdint>

namespace phalanx::apps {

// What this program speaks, at one place in the binary, so that it can be told of a file without
// running it (`strings` finds the mark). Nodes of one instance must agree on the three versions;
// `release` may differ.
struct BuildIdentity {
  char mark[16];              // "@(#)phalanx-0001"
  char release[16];           // padded with zeros
  uint32_t wire_version;      // of step plans
  uint32_t frame_version;     // of the data plane
  uint32_t numerics_version;  // rises whenever any kernel's bits change
};

[[nodiscard]] const BuildIdentity& build_identity();

}  // namespace phalanx::apps
