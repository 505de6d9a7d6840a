#include "phalanx/engine/draft_pace.h"

#include <algorithm>
#include <bit>
#include <cstddef>

namespace phalanx::engine {

namespace {

constexpr double kWeight = 0.1;  // of the newest observation, after the first ones
constexpr double kReach = 2;     // a stall of the machine is no more than that many times the usual

size_t batch_of(int64_t decodes) {
  return std::min<size_t>(std::bit_width(static_cast<uint64_t>(decodes)), 31);
}

}  // namespace

bool DraftPace::pays(int64_t decodes) const {
  const Batch& batch = batches_[batch_of(decodes)];
  if (batch.ways[1].seen < kTrials) return true;
  if (batch.ways[0].seen < kTrials) return false;
  return batch.drafts_better() == (batch.looks_left == 0);
}

void DraftPace::observe(int64_t decodes, bool drafted, int64_t tokens, int64_t ns) {
  if (decodes <= 0 || tokens <= 0 || ns <= 0) return;
  Batch& batch = batches_[batch_of(decodes)];
  const bool better = drafted == batch.drafts_better();
  Way& way = batch.ways[drafted ? 1 : 0];
  double value = static_cast<double>(ns) / static_cast<double>(tokens);
  if (++way.seen > kTrials) value = std::min(value, kReach * way.token_ns);
  const double weight = std::max(kWeight, 1.0 / static_cast<double>(way.seen));
  way.token_ns += weight * (value - way.token_ns);
  if (batch.ways[0].seen < kTrials || batch.ways[1].seen < kTrials) return;
  if (!better) {
    batch.looks_left = std::max(0, batch.looks_left - 1);
  } else if (++batch.since_look >= (drafted ? kLookPlainEvery : kLookDraftedEvery)) {
    batch.since_look = 0;
    batch.looks_left = kTrials;
  }
}

}  // namespace phalanx::engine
