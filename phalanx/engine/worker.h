#pragma once

#include <functional>
#include <string>

#include "phalanx/comm/traced_group.h"
#include "phalanx/engine/drafter.h"
#include "phalanx/engine/rank_page.h"
#include "phalanx/engine/step_channel.h"
#include "phalanx/models/model.h"

namespace phalanx::engine {

inline constexpr int64_t kFirstPieceBytes = 4096;

struct WorkerOptions {
  uint64_t generation = 0;
  StepLimits limits;
  double idle_seconds = 120;        // longest wait of rank 0 for a plan; the others wait for rank 0
                                    // in a broadcast, under the group's own cap
  std::string logits_folder;        // not empty: every step's logits rows are appended there (rank 0)
};

// The step loop of one rank: plan (rank 0: from the channel; others: broadcast by rank 0), check,
// forward, logits (rank 0: into the channel). Returns after a kStop plan. A plan must carry this
// generation and, unless it is kStop, the step after the last one; the first is 1. Any error is
// reported to the head (rank 0) and rethrown; the group is aborted first.
// A plan travels as a first piece of kFirstPieceBytes and, where it is longer, the rest.
// After a step with kTraceStep all ranks gather what `group` did in it (the model must use the same
// one), and rank 0 leaves that in the channel.
// Where the channel holds a draft order, rank 0 puts the drafter's guesses into the plan before it
// goes on to the others, and into the channel.
// channel: rank 0 only, else nullptr. page: may be nullptr. drafter: rank 0 only, nullptr without a
// draft model.
void run_worker(const WorkerOptions& options, models::Model& model, comm::TracedGroup& group,
                StepChannelRank* channel, RankPage* page, Drafter* drafter = nullptr);

}  // namespace phalanx::engine
