#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "phalanx/comm/traced_group.h"

namespace phalanx::engine {

// One collective of a traced step. Times in ticks of 100 ns; `begin` counts from the step's.
struct CollectiveTrace {
  uint32_t begin = 0;
  uint32_t length = 0;
  uint32_t wait = 0;  // of it, for a peer
  uint32_t bytes = 0;
};

inline constexpr int64_t kTraceTickNs = 100;

// What one rank tells of one step: gathered by all ranks behind the step, and left by rank 0 in the
// step channel. Layout: docs/wire.md.
struct RankTrace {
  uint32_t count = 0;    // of collectives
  uint32_t dropped = 0;  // collectives that found no place
  uint32_t length = 0;   // of the step, in ticks
  uint32_t reserved = 0;
  std::array<CollectiveTrace, comm::TracedGroup::kMaxEvents> collectives;
};
static_assert(sizeof(CollectiveTrace) == 16 && sizeof(RankTrace) == 16384);

// One step as head and ranks saw it. Head's times are now_ns(); a rank's step begins when the plan
// reaches it, soon after sent_ns (clocks of machines differ by more than that).
struct StepTrace {
  uint64_t generation = 0;
  uint64_t step = 0;
  int64_t begin_ns = 0;     // planning
  int64_t sent_ns = 0;
  int64_t answered_ns = 0;  // logits are here
  int64_t end_ns = 0;       // tokens are sampled
  int64_t draft_ns = 0;     // rank 0 computed the draft model, before the others got the plan
  int64_t sequences = 0;
  int64_t tokens = 0;
  int64_t rows = 0;
  struct Rank {
    uint32_t length = 0;
    uint32_t dropped = 0;
    std::vector<CollectiveTrace> collectives;
  };
  std::vector<Rank> ranks;
};

// The longest trace that an engine makes.
inline constexpr int64_t kMaxTracedSteps = 1000;

}  // namespace phalanx::engine
