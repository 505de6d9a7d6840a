#include "phalanx/engine/draft_pace.h"

#include <gtest/gtest.h>

namespace phalanx::engine {
namespace {

// Steps of the given number of sequences; returns how many of them drafted.
int run(DraftPace& pace, int64_t decodes, int steps, int64_t plain_ns, int64_t drafted_ns,
        int64_t drafted_tokens) {
  int drafted = 0;
  for (int i = 0; i < steps; ++i) {
    const bool drafts = pace.pays(decodes);
    drafted += drafts ? 1 : 0;
    pace.observe(decodes, drafts, drafts ? drafted_tokens : decodes, drafts ? drafted_ns : plain_ns);
  }
  return drafted;
}

TEST(DraftPace, TakesTheBetterWayAndLooksAtTheOther) {
  DraftPace pace;
  EXPECT_TRUE(pace.pays(1));
  // Twice as long for four times the tokens: nearly always.
  const int often = run(pace, 1, 1000, 1000, 2000, 4);
  EXPECT_GT(often, 970);
  EXPECT_LT(often, 1000);
  // Beside 8 sequences the same costs more than it brings: nearly never.
  const int seldom = run(pace, 8, 4000, 8000, 30000, 16);
  EXPECT_LT(seldom, 30);
  EXPECT_GE(seldom, 2 * DraftPace::kTrials);
  EXPECT_TRUE(pace.pays(1));
  EXPECT_FALSE(pace.pays(9));   // of 8 to 15
  EXPECT_TRUE(pace.pays(16));   // not known yet
}

TEST(DraftPace, ChangesItsMindWhenTimesChange) {
  DraftPace pace;
  (void)run(pace, 2, 1000, 1000, 5000, 4);
  EXPECT_FALSE(pace.pays(2));
  (void)run(pace, 2, 8000, 4000, 5000, 8);
  EXPECT_GT(run(pace, 2, 100, 4000, 5000, 8), 90);
}

TEST(DraftPace, AStallIsForgotten) {
  DraftPace pace;
  (void)run(pace, 1, 50, 1000, 2000, 4);
  pace.observe(1, true, 4, 2'000'000'000);
  (void)run(pace, 1, 600, 1000, 2000, 4);
  EXPECT_GT(run(pace, 1, 100, 1000, 2000, 4), 90);
}

TEST(DraftPace, IgnoresWhatSaysNothing) {
  DraftPace pace;
  pace.observe(0, true, 1, 1);
  pace.observe(1, true, 0, 1);
  pace.observe(1, true, 1, 0);
  EXPECT_TRUE(pace.pays(1));
}

}  // namespace
}  // namespace phalanx::engine
