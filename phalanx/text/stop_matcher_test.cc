#include "phalanx/text/stop_matcher.h"

#include <gtest/gtest.h>

#include <random>

namespace phalanx::text {
namespace {

struct Outcome {
  std::string text;
  bool stopped = false;
  std::string matched;
  bool operator==(const Outcome&) const = default;
};

Outcome feed(StopMatcher matcher, const std::vector<std::string>& pieces) {
  Outcome outcome;
  for (const std::string& piece : pieces) {
    const auto result = matcher.push(piece);
    outcome.text += result.emit;
    if (result.stopped) {
      outcome.stopped = true;
      outcome.matched = result.matched;
    }
  }
  outcome.text += matcher.flush();
  return outcome;
}

TEST(StopMatcher, FindsAcrossPieces) {
  EXPECT_EQ(feed({{"STOP"}, false}, {"one S", "T", "OP two"}), (Outcome{"one ", true, "STOP"}));
  EXPECT_EQ(feed({{"STOP"}, true}, {"one S", "T", "OP two"}), (Outcome{"one STOP", true, "STOP"}));
  EXPECT_EQ(feed({{"STOP"}, false}, {"one S", "T", "O"}), (Outcome{"one STO", false, ""}));
}

TEST(StopMatcher, HoldsBackOnlyWhatMayBegin) {
  StopMatcher matcher({"\n\nQ:"}, false);
  EXPECT_EQ(matcher.push("a\n").emit, "a");
  EXPECT_EQ(matcher.push("\n").emit, "");
  EXPECT_EQ(matcher.push("\n").emit, "\n");  // the last two may still begin it
  EXPECT_EQ(matcher.push("b").emit, "\n\nb");
}

TEST(StopMatcher, SelfOverlap) {
  EXPECT_EQ(feed({{"aab"}, false}, {"a", "a", "a", "b"}), (Outcome{"a", true, "aab"}));
}

TEST(StopMatcher, NothingAfterTheMatch) {
  StopMatcher matcher({"x"}, true);
  EXPECT_TRUE(matcher.push("ax").stopped);
  const auto later = matcher.push("bx");
  EXPECT_FALSE(later.stopped);
  EXPECT_EQ(later.emit, "");
  EXPECT_EQ(matcher.flush(), "");
}

TEST(StopMatcher, NoOrEmptyStopsPassThrough) {
  StopMatcher matcher({""}, false);
  EXPECT_EQ(matcher.push("abc").emit, "abc");
}

TEST(StopMatcher, FirstToEndWinsThenTheLonger) {
  EXPECT_EQ(feed({{"abcd", "bc"}, false}, {"abcd"}), (Outcome{"a", true, "bc"}));
  EXPECT_EQ(feed({{"bc", "abc"}, false}, {"xabc"}), (Outcome{"x", true, "abc"}));
}

// The answer must not depend on the cuts; the oracle looks at every prefix of the text.
TEST(StopMatcher, RandomTextsAndCuts) {
  std::mt19937 random(3);
  const auto word = [&](size_t longest) {
    std::string text;
    for (size_t n = 1 + random() % longest; n > 0; --n) text += "ab\xC3"[random() % 3];
    return text;
  };
  for (int round = 0; round < 5000; ++round) {
    const std::string text = word(24);
    std::vector<std::string> stops;
    for (size_t n = random() % 3; n > 0; --n) stops.push_back(word(5));
    const bool include = random() % 2 == 0;
    Outcome expected{text, false, ""};
    for (size_t end = 1; end <= text.size() && !expected.stopped; ++end)
      for (const std::string& stop : stops)
        if (std::string_view(text).substr(0, end).ends_with(stop) &&
            stop.size() > expected.matched.size())
          expected = {text.substr(0, include ? end : end - stop.size()), true, stop};
    std::vector<std::string> pieces;
    for (size_t at = 0; at < text.size();) {
      const size_t n = std::min<size_t>(random() % 5, text.size() - at);
      pieces.push_back(text.substr(at, n));
      at += n;
    }
    ASSERT_EQ(feed({stops, include}, pieces), expected) << "round " << round;
  }
}

}  // namespace
}  // namespace phalanx::text
