#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace phalanx::engine {

struct PromptLookup {
  int64_t most = 4;   // tokens of the run that is looked up, at most and at least
  int64_t least = 2;
};

// Guesses what follows `tokens`: the longest run at their end (of at most `most`, at least `least`
// tokens) that occurred before, where it occurred last, was followed by these. Appends at most `count`
// to `draft`; a run that repeats itself is continued. Looks back kReach tokens.
void draft_by_lookup(std::span<const int32_t> tokens, const PromptLookup& lookup, int64_t count,
                     std::vector<int32_t>& draft);

inline constexpr int64_t kReach = 16384;

}  // namespace phalanx::engine
