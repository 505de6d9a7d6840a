#include "phalanx/engine/prompt_lookup.h"

#include <gtest/gtest.h>

#include <numeric>

namespace phalanx::engine {
namespace {

std::vector<int32_t> draft(const std::vector<int32_t>& tokens, int64_t count = 4, PromptLookup lookup = {}) {
  std::vector<int32_t> found;
  draft_by_lookup(tokens, lookup, count, found);
  return found;
}
using Ids = std::vector<int32_t>;

TEST(PromptLookup, TakesWhatFollowedTheLongestRun) {
  EXPECT_EQ(draft({1, 2, 3, 9, 8, 2, 3, 7, 1, 2, 3}), (Ids{9, 8, 2, 3}));
  EXPECT_EQ(draft({5, 2, 3, 9, 8, 2, 3, 7, 1, 2, 3}), (Ids{7, 1, 2, 3}));  // equal runs: the newer
  EXPECT_EQ(draft({1, 2, 3, 9, 8, 2, 3, 7, 1, 2, 3}, 2), (Ids{9, 8}));
}

TEST(PromptLookup, ContinuesARepetition) {
  EXPECT_EQ(draft({4, 7, 7, 7}, 5), (Ids{7, 7, 7, 7, 7}));
  EXPECT_EQ(draft({1, 2, 3, 1, 2, 3}, 7), (Ids{1, 2, 3, 1, 2, 3, 1}));
}

TEST(PromptLookup, HasNoGuessWithoutARun) {
  EXPECT_EQ(draft({}), Ids{});
  EXPECT_EQ(draft({1}), Ids{});
  EXPECT_EQ(draft({1, 2, 3, 4}), Ids{});
  EXPECT_EQ(draft({3, 9, 3}), Ids{});  // one token is too little
  EXPECT_EQ(draft({3, 9, 3}, 2, {.most = 1, .least = 1}), (Ids{9, 3}));
}

TEST(PromptLookup, LooksBackABoundedWay) {
  Ids tokens(static_cast<size_t>(kReach) + 10);
  std::iota(tokens.begin(), tokens.end(), 100);
  tokens.insert(tokens.end(), {100, 101, 102});
  EXPECT_EQ(draft(tokens), Ids{});
  tokens.insert(tokens.end(), {tokens[200], tokens[201]});
  EXPECT_EQ(draft(tokens, 1), (Ids{tokens[202]}));
}

}  // namespace
}  // namespace phalanx::engine
