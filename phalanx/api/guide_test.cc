#include "phalanx/api/guide.h"

#include <gtest/gtest.h>

#include <atomic>

#include "phalanx/base/error.h"

namespace phalanx::api {
namespace {

constexpr int64_t kVocab = 70;

// Allows one id after the other; refuses any other.
class CountingWalker final : public text::GrammarWalker {
 public:
  void mask(std::span<uint32_t> out) override {
    std::fill(out.begin(), out.end(), 0u);
    out[static_cast<size_t>(next_ / 32)] |= 1u << (next_ % 32);
  }
  void accept(int32_t token) override {
    if (token != next_) throw Error(Code::kInvalidArgument, "not the next one");
    ++next_;
  }
  bool ended() const override { return false; }
  std::unique_ptr<text::GrammarWalker> clone() const override {
    return std::make_unique<CountingWalker>(*this);
  }

 private:
  int32_t next_ = 0;
};

int32_t only(std::span<const uint32_t> mask) {
  int32_t found = -1;
  for (int32_t i = 0; i < kVocab && !mask.empty(); ++i) {
    if ((mask[static_cast<size_t>(i / 32)] >> (i % 32) & 1) == 0) continue;
    if (found >= 0) return -2;
    found = i;
  }
  return found;
}

TEST(Guide, AMaskIsReadyAfterEveryToken) {
  const auto threads = std::make_shared<GuideThreads>(2);
  const auto guide = make_guide({.vocab_size = kVocab}, std::make_unique<CountingWalker>(), threads);
  for (int32_t i = 0; i < 60; ++i) {
    EXPECT_EQ(only(guide->allowed()), i);
    EXPECT_EQ(only(guide->allowed()), i);  // asking changes nothing
    guide->accept(i);
  }
}

TEST(Guide, ManySequencesShareTheThreads) {
  const auto threads = std::make_shared<GuideThreads>(2);
  std::vector<std::shared_ptr<engine::TokenGuide>> guides;
  for (int i = 0; i < 30; ++i)
    guides.push_back(make_guide({.vocab_size = kVocab}, std::make_unique<CountingWalker>(), threads));
  for (int32_t step = 0; step < 40; ++step) {
    for (const auto& guide : guides) ASSERT_EQ(only(guide->allowed()), step);
    for (const auto& guide : guides) guide->accept(step);
  }
  guides.clear();  // with work perhaps still queued
}

TEST(Guide, AFailureIsToldAtTheNextMask) {
  const auto threads = std::make_shared<GuideThreads>(1);
  const auto guide = make_guide({.vocab_size = kVocab}, std::make_unique<CountingWalker>(), threads);
  guide->accept(7);
  EXPECT_THROW((void)guide->allowed(), Error);
}

TEST(Guide, ReasoningEndsByItselfOrByItsBudget) {
  const auto threads = std::make_shared<GuideThreads>(1);
  const GuideOptions options{
      .vocab_size = kVocab, .reasoning = true, .reasoning_end = {50, 51}, .reasoning_budget = 3};
  // By itself: then the grammar.
  auto guide = make_guide(options, std::make_unique<CountingWalker>(), threads);
  EXPECT_TRUE(guide->allowed().empty());
  guide->accept(50);
  guide->accept(51);
  EXPECT_EQ(only(guide->allowed()), 0);
  // By the budget: the end is forced, id by id.
  guide = make_guide(options, nullptr, threads);
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(guide->allowed().empty());
    guide->accept(9);
  }
  EXPECT_EQ(only(guide->allowed()), 50);
  guide->accept(50);
  EXPECT_EQ(only(guide->allowed()), 51);
  guide->accept(51);
  EXPECT_TRUE(guide->allowed().empty());
}

}  // namespace
}  // namespace phalanx::api
