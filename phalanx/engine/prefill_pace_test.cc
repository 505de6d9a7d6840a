#include "phalanx/engine/prefill_pace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

namespace phalanx::engine {
namespace {

// A machine whose step takes `decode` + 1 us a prompt token, of which `free` cost nothing because
// the weights have to be read anyway.
int64_t step_ns(int64_t decode, int64_t tokens, int64_t free) {
  return decode + std::max<int64_t>(0, tokens - free) * 1000;
}

TEST(PrefillPace, FindsTheShareThatStretchesAStepAsAllowed) {
  for (const int64_t decode : {20'000, 5'000'000}) {
    for (const int64_t free : {0, 10}) {
      PrefillPace pace(1.7);
      for (int i = 0; i < 3; ++i) pace.observe(4, 0, decode);
      for (int i = 0; i < 60; ++i) {
        const int64_t tokens = pace.budget(4);
        pace.observe(4, tokens, step_ns(decode, tokens, free));
      }
      const int64_t ns = step_ns(decode, pace.budget(4), free);
      EXPECT_LE(ns, decode * 9 / 5);
      if (decode > 100'000) {
        EXPECT_GE(ns, decode * 8 / 5);
      }
    }
  }
}

TEST(PrefillPace, OneStraySlowStepDoesNotStopPrompts) {
  PrefillPace pace(2.0);
  pace.observe(1, 0, 1'000'000);
  for (int i = 0; i < 20; ++i) pace.observe(1, 500, step_ns(1'000'000, 500, 0));
  const int64_t before = pace.budget(1);
  pace.observe(1, before, 1'000'000'000);
  EXPECT_GE(pace.budget(1), before / 2);
}

TEST(PrefillPace, BoundsNothingWhereNothingDecodesOrNoneIsAsked) {
  EXPECT_EQ(PrefillPace(1.7).budget(0), std::numeric_limits<int64_t>::max());
  EXPECT_EQ(PrefillPace(0).budget(5), std::numeric_limits<int64_t>::max());
  PrefillPace pace(1.7);
  pace.observe(1, 0, 1000);
  pace.observe(1, 100, 1'000'000);
  EXPECT_EQ(pace.budget(1), PrefillPace::kLeast) << "prompts always go on";
}

}  // namespace
}  // namespace phalanx::engine
