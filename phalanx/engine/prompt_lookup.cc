#include "phalanx/engine/prompt_lookup.h"

#include <algorithm>

namespace phalanx::engine {

void draft_by_lookup(std::span<const int32_t> tokens, const PromptLookup& lookup, int64_t count,
                     std::vector<int32_t>& draft) {
  if (std::ssize(tokens) > kReach) tokens = tokens.last(static_cast<size_t>(kReach));
  const int64_t length = std::ssize(tokens);
  const auto at = [&](int64_t i) { return tokens[static_cast<size_t>(i)]; };
  // One pass, newest first: how far back from each earlier token the end of the run agrees.
  int64_t best = 0, best_end = 0;
  for (int64_t end = length - 2; end >= 0 && best < lookup.most; --end) {
    int64_t same = 0;
    while (same < lookup.most && same <= end && at(end - same) == at(length - 1 - same)) ++same;
    if (same <= best) continue;
    best = same;
    best_end = end;
  }
  if (best < lookup.least) return;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = best_end + 1 + i;
    draft.push_back(from < length ? at(from) : draft[static_cast<size_t>(from - length)]);
  }
}

}  // namespace phalanx::engine
