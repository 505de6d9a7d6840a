#include "phalanx/engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "phalanx/base/sanitizer.h"
#include "phalanx/engine/philox.h"

namespace phalanx::engine {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> random_logits(int64_t vocab, unsigned seed, float spread = 2.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> logits(static_cast<size_t>(vocab));
  for (float& l : logits) l = normal(random);
  return logits;
}

SampleResult sample(std::span<const float> logits, const SamplingParams& params, uint64_t seed = 1,
                    uint32_t position = 1, const TokenCounts* counts = nullptr, int32_t outputs = 0,
                    std::vector<TokenLogprob>* top = nullptr) {
  Sampler sampler(static_cast<int64_t>(logits.size()));
  return sampler.sample(logits,
                        {.params = &params,
                         .seed = seed,
                         .position = position,
                         .outputs = outputs,
                         .counts = counts},
                        top);
}

// kat_vectors of Random123.
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}),
            (std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (std::array<uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (std::array<uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, DrawsAreUniform) {
  std::vector<int> buckets(64);
  const int draws = 64000;
  for (int i = 0; i < draws; ++i) {
    const double u = uniform_draw(123, 0, static_cast<uint32_t>(i), 0);
    ASSERT_GE(u, 0);
    ASSERT_LT(u, 1);
    ++buckets[static_cast<size_t>(u * 64)];
  }
  double chi = 0;
  for (const int count : buckets) chi += (count - 1000.0) * (count - 1000.0) / 1000.0;
  EXPECT_LT(chi, 104);  // 63 degrees of freedom, p = 0.001
}

TEST(Numbers, ExponentialAndLogarithm) {
  for (float x = 0; x > -86.5f; x -= 0.0137f) {
    ASSERT_NEAR(portable_exp(x) / std::exp(static_cast<double>(x)), 1, 2e-7) << x;
  }
  EXPECT_EQ(portable_exp(0), 1.0f);
  EXPECT_EQ(portable_exp(-88), 0.0f);
  EXPECT_EQ(portable_exp(-kInfinity), 0.0f);
  for (double x = 1e-3; x < 1e6; x *= 1.07) {
    ASSERT_NEAR(portable_log(x), std::log(x), 1e-14 * std::max(1.0, std::fabs(std::log(x)))) << x;
  }
  EXPECT_EQ(portable_log(1), 0.0);
}

TEST(Numbers, LogSumExp) {
  for (const int64_t vocab : {1, 15, 1024, 1025, 5000}) {
    const auto logits = random_logits(vocab, 3);
    double sum = 0;
    for (const float l : logits) sum += std::exp(static_cast<double>(l));
    EXPECT_NEAR(log_sum_exp(logits, *std::max_element(logits.begin(), logits.end())),
                std::log(sum), 1e-6);
  }
}

TEST(Numbers, WiderRegistersGiveTheSameBits) {
  const RowMath& portable = portable_row_math();
  const RowMath& best = best_row_math();
  if (&portable == &best) GTEST_SKIP() << "this CPU has no AVX2";
  auto x = random_logits(1024, 8, 20.0f);
  x[5] = -kInfinity;
  const float max = *std::max_element(x.begin(), x.end());
  for (const int64_t count : {1, 7, 16, 31, 1000, 1024}) {
    std::vector<float> a(1024), b(1024);
    EXPECT_EQ(portable.weigh(x.data(), count, max, 0.7f, 1e-9f, a.data()),
              best.weigh(x.data(), count, max, 0.7f, 1e-9f, b.data()));
    EXPECT_EQ(a, b);
    int64_t found_a = 0, found_b = 0;
    EXPECT_EQ(portable.mass(a.data(), count, 1e-6f, &found_a),
              best.mass(b.data(), count, 1e-6f, &found_b));
    EXPECT_EQ(found_a, found_b);
    EXPECT_EQ(found_a, std::count_if(a.begin(), a.end(), [](float w) { return w >= 1e-6f; }));
  }
}

TEST(Sampler, GreedyTakesTheHighestAndTheLowerIdOfTwo) {
  SamplingParams greedy{.temperature = 0};
  for (const int64_t vocab : {1, 5, 63, 64, 65, 1000, 49152}) {
    auto logits = random_logits(vocab, 5);
    const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    EXPECT_EQ(sample(logits, greedy).token, best);
    logits.back() = 100;
    EXPECT_EQ(sample(logits, greedy).token, vocab - 1);
    logits[static_cast<size_t>(vocab / 2)] = 100;
    EXPECT_EQ(sample(logits, greedy).token, vocab / 2);
    logits[0] = 100;
    EXPECT_EQ(sample(logits, greedy).token, 0);
  }
  // A temperature of next to nothing and top_k 1 are greedy too.
  const auto logits = random_logits(777, 6);
  const int32_t best = sample(logits, greedy).token;
  EXPECT_EQ(sample(logits, {.temperature = 1e-6f}).token, best);
  EXPECT_EQ(sample(logits, {.temperature = 2.0f, .top_k = 1}).token, best);
}

TEST(Sampler, NotFiniteIsNotValid) {
  const SamplingParams greedy{.temperature = 0};
  const SamplingParams warm{.temperature = 1, .logprobs = 3};
  for (const size_t at : {size_t{0}, size_t{70}, size_t{199}}) {
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), kInfinity}) {
      auto logits = random_logits(200, 1);
      logits[at] = bad;
      EXPECT_FALSE(sample(logits, greedy).valid);
      EXPECT_FALSE(sample(logits, warm).valid);
    }
    auto logits = random_logits(200, 1);
    logits[at] = -kInfinity;
    EXPECT_TRUE(sample(logits, greedy).valid);
  }
  EXPECT_FALSE(sample(std::vector<float>(100, -kInfinity), greedy).valid);
}

// How often each token is drawn over many positions.
std::map<int32_t, int> histogram(std::span<const float> logits, const SamplingParams& params,
                                 int draws) {
  Sampler sampler(static_cast<int64_t>(logits.size()));
  std::map<int32_t, int> counts;
  for (int i = 0; i < draws; ++i) {
    const SampleResult r = sampler.sample(
        logits, {.params = &params, .seed = 42, .position = static_cast<uint32_t>(i)}, nullptr);
    EXPECT_TRUE(r.valid);
    ++counts[r.token];
  }
  return counts;
}

// The distribution by the formulas of sampler.h, in double and with full sorting.
std::vector<double> oracle(std::span<const float> logits, const SamplingParams& p) {
  std::vector<size_t> order(logits.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  const double max = logits[order[0]];
  std::vector<double> weights(logits.size(), 0);
  double total = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    if (p.top_k > 0 && i >= static_cast<size_t>(p.top_k)) break;
    const double w = std::exp((logits[order[i]] - max) / static_cast<double>(p.temperature));
    if (w < p.min_p) break;
    weights[order[i]] = w;
    total += w;
  }
  double sum = 0;
  for (const size_t id : order) {
    if (sum >= p.top_p * total && p.top_p < 1) weights[id] = 0;
    sum += weights[id];
  }
  const double kept = std::accumulate(weights.begin(), weights.end(), 0.0);
  for (double& w : weights) w /= kept;
  return weights;
}

class Distribution : public ::testing::TestWithParam<SamplingParams> {};

TEST_P(Distribution, IsTheOneOfTheFormula) {
  const SamplingParams& params = GetParam();
  for (const int64_t vocab : {12, 1500}) {
    const auto logits = random_logits(vocab, static_cast<unsigned>(vocab), 1.5f);
    const auto expected = oracle(logits, params);
    const int draws = kThreadSanitizer ? 3000 : 30000;
    const auto counts = histogram(logits, params, draws);
    // Tokens too rare for their own cell share one.
    double chi = 0, rest_expected = 0;
    int cells = 0, rest_found = 0;
    for (size_t id = 0; id < expected.size(); ++id) {
      const auto found = counts.find(static_cast<int32_t>(id));
      const int n = found == counts.end() ? 0 : found->second;
      if (expected[id] == 0) {
        ASSERT_EQ(n, 0) << "token " << id << " was filtered out";
        continue;
      }
      const double want = expected[id] * draws;
      if (want < 8) {
        rest_expected += want;
        rest_found += n;
        continue;
      }
      ++cells;
      chi += (n - want) * (n - want) / want;
    }
    if (rest_expected > 0) {
      ++cells;
      chi += (rest_found - rest_expected) * (rest_found - rest_expected) / rest_expected;
    }
    // Mean cells - 1, variance 2 * (cells - 1): 4 standard deviations above.
    EXPECT_LE(chi, cells - 1 + 4 * std::sqrt(2.0 * std::max(1, cells - 1))) << vocab;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Sampler, Distribution,
    ::testing::Values(SamplingParams{.temperature = 1}, SamplingParams{.temperature = 0.4f},
                      SamplingParams{.temperature = 1.7f}, SamplingParams{.top_k = 7},
                      SamplingParams{.top_k = 11, .top_p = 0.6f}, SamplingParams{.top_p = 0.5f},
                      SamplingParams{.top_p = 0.97f}, SamplingParams{.min_p = 0.2f},
                      SamplingParams{.top_p = 0.8f, .min_p = 0.05f},
                      SamplingParams{.top_k = 9, .min_p = 0.3f}),
    [](const auto& info) { return "case" + std::to_string(info.index); });

TEST(Sampler, TopPAtItsEdges) {
  // Probabilities 1/2, 1/4, 1/8, 1/8 by ids 3, 1, 0, 2.
  const std::vector<float> logits{std::log(1.0f), std::log(2.0f), std::log(1.0f), std::log(4.0f)};
  const auto kept = [&](float top_p) {
    std::set<int32_t> ids;
    for (const auto& [id, n] : histogram(logits, {.top_p = top_p}, 2000)) ids.insert(id);
    return ids;
  };
  EXPECT_EQ(kept(1e-6f), (std::set<int32_t>{3}));
  EXPECT_EQ(kept(0.49f), (std::set<int32_t>{3}));
  EXPECT_EQ(kept(0.51f), (std::set<int32_t>{1, 3}));
  EXPECT_EQ(kept(0.76f), (std::set<int32_t>{0, 1, 3}));  // the lower id of the two equal ones
  EXPECT_EQ(kept(0.9f), (std::set<int32_t>{0, 1, 2, 3}));
  EXPECT_EQ(kept(1.0f), (std::set<int32_t>{0, 1, 2, 3}));
}

TEST(Sampler, TopKAtItsEdges) {
  std::vector<float> logits(3000, 0.0f);  // all equal: the lowest ids are kept
  const auto kept = [&](int32_t top_k) {
    return histogram(logits, {.top_k = top_k}, kThreadSanitizer ? 400 : 4000);
  };
  const auto five = kept(5);
  EXPECT_EQ(five.size(), 5u);
  EXPECT_EQ(five.rbegin()->first, 4);
  EXPECT_GT(kept(3000).rbegin()->first, 2000);
  EXPECT_GT(kept(100000).rbegin()->first, 2000);
  EXPECT_GT(kept(0).rbegin()->first, 2000);  // off
  logits[2999] = 1;
  EXPECT_EQ(kept(2).size(), 2u);
  EXPECT_TRUE(kept(2).contains(2999));
  EXPECT_TRUE(kept(2).contains(0));
}

TEST(Sampler, PenaltiesChangeWhatWasSeen) {
  TokenCounts counts(4, 4);
  counts.add_prompt(0);
  counts.add_prompt(1);
  counts.add_output(1);
  counts.add_output(1);
  // id:                             0     1    2      3
  const std::vector<float> positive{2.0f, 2.5f, 1.2f, 0.0f};
  SamplingParams p{.temperature = 0};
  EXPECT_EQ(sample(positive, p, 1, 1, &counts).token, 1);
  p.presence_penalty = 0.6f;
  EXPECT_EQ(sample(positive, p, 1, 1, &counts).token, 0);  // 2.0 against 1.9: prompt not counted
  p.presence_penalty = 0;
  p.frequency_penalty = 0.2f;
  EXPECT_EQ(sample(positive, p, 1, 1, &counts).token, 1);  // 2.1
  p.frequency_penalty = 0.3f;
  EXPECT_EQ(sample(positive, p, 1, 1, &counts).token, 0);  // 1.9
  p.frequency_penalty = 0;
  p.repetition_penalty = 2.5f;
  EXPECT_EQ(sample(positive, p, 1, 1, &counts).token, 2);  // 0.8, 1.0, 1.2
  const std::vector<float> negative{-1.0f, -5.0f, -2.1f, -9.0f};
  p.repetition_penalty = 2.0f;
  EXPECT_EQ(sample(negative, p, 1, 1, &counts).token, 0);  // -2 against -2.1
  p.repetition_penalty = 2.2f;
  EXPECT_EQ(sample(negative, p, 1, 1, &counts).token, 2);
}

TEST(Sampler, MinTokensMasksStopIds) {
  const std::vector<float> logits{0, 9, 5, 7};
  const SamplingParams p{.temperature = 0, .min_tokens = 2, .stop_token_ids = {1, 3, 1000, -5}};
  EXPECT_EQ(sample(logits, p, 1, 1, nullptr, 0).token, 2);
  EXPECT_EQ(sample(logits, p, 1, 1, nullptr, 1).token, 2);
  EXPECT_EQ(sample(logits, p, 1, 1, nullptr, 2).token, 1);
}

TEST(Sampler, LogprobsAreThoseOfTheRawLogits) {
  const auto logits = random_logits(3000, 9);
  double sum = 0;
  for (const float l : logits) sum += std::exp(static_cast<double>(l));
  TokenCounts counts(3000, 8);
  counts.add_output(17);
  std::vector<TokenLogprob> top;
  const SampleResult r = sample(
      logits, {.temperature = 0.7f, .top_k = 3, .presence_penalty = 1, .logprobs = 5}, 3, 3,
      &counts, 1, &top);
  EXPECT_NEAR(r.logprob, logits[static_cast<size_t>(r.token)] - std::log(sum), 1e-5);
  ASSERT_EQ(top.size(), 5u);
  std::vector<float> sorted = logits;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  for (size_t i = 0; i < top.size(); ++i) {
    EXPECT_EQ(logits[static_cast<size_t>(top[i].token)], sorted[i]);
    EXPECT_NEAR(top[i].logprob, sorted[i] - std::log(sum), 1e-5);
  }
}

TEST(Sampler, DependsOnSeedAndPositionOnly) {
  const auto logits = random_logits(2000, 4);
  const SamplingParams p{.temperature = 1.2f, .top_p = 0.95f};
  Sampler busy(2000);
  std::set<int32_t> seen;
  for (uint32_t position = 0; position < 50; ++position) {
    const SampleRequest request{.params = &p, .seed = 77, .position = position};
    const int32_t alone = sample(logits, p, 77, position).token;
    EXPECT_EQ(busy.sample(logits, request, nullptr).token, alone);
    (void)busy.sample(random_logits(2000, position), request, nullptr);
    EXPECT_EQ(busy.sample(logits, request, nullptr).token, alone);
    seen.insert(alone);
  }
  EXPECT_GT(seen.size(), 10u);
  std::map<int32_t, int> other_seed;
  for (uint32_t i = 0; i < 40; ++i) ++other_seed[sample(logits, p, 43, i).token];
  EXPECT_NE(histogram(logits, p, 40), other_seed);
}

// Allows what it is told to.
class FixedGuide final : public TokenGuide {
 public:
  explicit FixedGuide(std::vector<uint32_t> words) : words_(std::move(words)) {}
  std::span<const uint32_t> allowed() override {
    if (broken) throw Error(Code::kInvalidArgument, "no way on");
    return words_;
  }
  void accept(int32_t) override {}
  bool broken = false;

 private:
  std::vector<uint32_t> words_;
};

TEST(Sampler, TakesOnlyWhatTheGuideAllows) {
  const std::vector<float> logits = random_logits(100, 5);
  for (const float temperature : {0.0f, 1.0f}) {
    for (const int32_t top_k : {-1, 3}) {
      SamplingParams params{.temperature = temperature, .top_k = top_k};
      params.guide = std::make_shared<FixedGuide>(std::vector<uint32_t>{0, 0x80u, 0, 0x3u});
      std::set<int32_t> seen;
      for (uint64_t seed = 1; seed < 60; ++seed) {
        const SampleResult result = sample(logits, params, seed);
        ASSERT_TRUE(result.valid);
        seen.insert(result.token);
      }
      for (const int32_t token : seen) {
        EXPECT_TRUE(token == 39 || token == 96 || token == 97) << token;
      }
      if (temperature > 0) {
        EXPECT_GT(seen.size(), 1u);
      }
    }
  }
  // Fewer words than the vocabulary: what lies beyond may not come. No words: all may.
  SamplingParams params{.temperature = 0};
  params.guide = std::make_shared<FixedGuide>(std::vector<uint32_t>{0x10u});
  EXPECT_EQ(sample(logits, params).token, 4);
  const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
  params.guide = std::make_shared<FixedGuide>(std::vector<uint32_t>{});
  EXPECT_EQ(sample(logits, params).token, best);
}

TEST(Sampler, AGuideThatHasNoWayOnEndsTheRequestWithItsReason) {
  const std::vector<float> logits = random_logits(100, 5);
  SamplingParams params{.temperature = 0};
  const auto guide = std::make_shared<FixedGuide>(std::vector<uint32_t>{0, 0, 0, 0});
  params.guide = guide;
  SampleResult result = sample(logits, params);
  EXPECT_FALSE(result.valid);
  EXPECT_NE(result.error.find("allows no further token"), std::string::npos);
  guide->broken = true;
  result = sample(logits, params);
  EXPECT_FALSE(result.valid);
  EXPECT_EQ(result.error, "no way on");
  // Where only a stop id may come, min_tokens gives way.
  params.guide = std::make_shared<FixedGuide>(std::vector<uint32_t>{0x20u});
  params.stop_token_ids = {5};
  params.min_tokens = 9;
  result = sample(logits, params);
  EXPECT_TRUE(result.valid);
  EXPECT_EQ(result.token, 5);
}

TEST(Sampler, AddsTheBias) {
  const std::vector<float> logits = random_logits(100, 5);
  SamplingParams params{.temperature = 0, .logprobs = 0};
  params.logit_bias = {{7, 100.0f}, {9, -100.0f}};
  const SampleResult result = sample(logits, params);
  EXPECT_EQ(result.token, 7);
  // Log-probabilities stay those of the model.
  EXPECT_LT(result.logprob, -0.5f);
  params.logit_bias = {{7, 100.0f}, {9, 100.0f}};
  params.temperature = 1;
  std::set<int32_t> seen;
  for (uint64_t seed = 1; seed < 60; ++seed) seen.insert(sample(logits, params, seed).token);
  EXPECT_EQ(seen, (std::set<int32_t>{7, 9}));
}

}  // namespace
}  // namespace phalanx::engine
