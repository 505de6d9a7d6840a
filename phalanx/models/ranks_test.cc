// No cut, batch, chunk, thread count or kernel path changes a bit of the logits.

#include <gtest/gtest.h>

#include <cstring>
#include <numeric>

#include "phalanx/base/sanitizer.h"
#include "phalanx/models/test_ranks.h"

namespace phalanx::models {
namespace {

const std::string kNineHeads = std::string(PHALANX_ORACLE_DIR) + "/nine_heads_f32";
const std::string kSixHeads = std::string(PHALANX_ORACLE_DIR) + "/tied_bf16";
const std::string kBiases = std::string(PHALANX_ORACLE_DIR) + "/biases_f16";
constexpr int32_t kVocab = 170;  // of the smallest

std::vector<int32_t> tokens_of(int sequence, int64_t count) {
  std::vector<int32_t> tokens;
  uint32_t state = 12345U + static_cast<uint32_t>(sequence) * 977U;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525U + 1013904223U;
    tokens.push_back(static_cast<int32_t>(state >> 8) % kVocab);
  }
  return tokens;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<float> rows_of(const std::vector<float>& logits, size_t rows, size_t begin,
                           size_t count) {
  const size_t vocab = logits.size() / rows;
  return {logits.begin() + static_cast<long>(begin * vocab),
          logits.begin() + static_cast<long>((begin + count) * vocab)};
}

// A whole prefill of each of `count` sequences of different lengths, then one step of decoding.
std::vector<TestStep> mixed(int count) {
  TestStep prefill;
  TestStep decode;
  for (int s = 0; s < count; ++s) {
    const int64_t length = 1 + (s * 7) % 23;
    auto tokens = tokens_of(s, length + 1);
    decode.slices.push_back({.sequence = s, .begin = length, .tokens = {tokens.back()}});
    tokens.pop_back();
    prefill.slices.push_back({.sequence = s, .tokens = std::move(tokens)});
  }
  return {prefill, decode};
}

class Ranks : public ::testing::TestWithParam<ops::Isa> {};

TEST_P(Ranks, OneEqualsMany) {
  for (const std::string& model : {kNineHeads, kSixHeads, kBiases}) {
    const auto steps = mixed(5);
    const RunOptions alone{.directory = model, .isa = GetParam(), .sequences = 5};
    const auto expected = run_steps(alone, steps);
    ASSERT_FALSE(expected.empty());
    for (int ranks = 2; ranks <= (model == kNineHeads ? 8 : 6); ++ranks) {
      RunOptions cut = alone;
      cut.weights.assign(static_cast<size_t>(ranks), 1.0);
      EXPECT_TRUE(same_bits(run_steps(cut, steps), expected)) << model << " on " << ranks;
    }
  }
}

TEST_P(Ranks, UnequalWeightsChangeNothing) {
  const auto steps = mixed(3);
  const RunOptions alone{.directory = kNineHeads, .isa = GetParam(), .sequences = 3};
  const auto expected = run_steps(alone, steps);
  // The last leaves some ranks without heads, panels or vocabulary.
  for (const std::vector<double>& weights :
       {std::vector<double>{3, 1}, {1, 5, 2}, {0.3, 0.1, 1.0, 0.2}, {1000, 1, 1, 1, 1}}) {
    RunOptions cut = alone;
    cut.weights = weights;
    EXPECT_TRUE(same_bits(run_steps(cut, steps), expected)) << weights.size();
  }
}

TEST_P(Ranks, BatchChangesNothing) {
  for (const int ranks : {1, 3}) {
    RunOptions options{.directory = kSixHeads, .isa = GetParam(), .sequences = 32};
    options.weights.assign(static_cast<size_t>(ranks), 1.0);
    const auto all = mixed(32);
    const auto together = run_steps(options, all);
    const size_t prefill_rows =
        std::accumulate(all[0].slices.begin(), all[0].slices.end(), size_t{0},
                        [](size_t n, const TestSlice& s) { return n + s.tokens.size(); });
    size_t row = 0;
    for (size_t s = 0; s < 32; s += 5) {
      row = std::accumulate(all[0].slices.begin(), all[0].slices.begin() + static_cast<long>(s),
                            size_t{0}, [](size_t n, const TestSlice& t) { return n + t.tokens.size(); });
      const std::vector<TestStep> one = {{.slices = {all[0].slices[s]}},
                                         {.slices = {all[1].slices[s]}}};
      const auto alone = run_steps(options, one);
      const size_t length = all[0].slices[s].tokens.size();
      EXPECT_TRUE(same_bits(rows_of(alone, length + 1, 0, length),
                            rows_of(together, prefill_rows + 32, row, length)))
          << s;
      EXPECT_TRUE(same_bits(rows_of(alone, length + 1, length, 1),
                            rows_of(together, prefill_rows + 32, prefill_rows + s, 1)))
          << s;
    }
  }
}

TEST_P(Ranks, ChunksChangeNothing) {
  if (kThreadSanitizer && GetParam() == ops::Isa::kRef) GTEST_SKIP() << "slow, no other threads";
  constexpr int64_t kLength = 300;  // more than one chunk of attention
  const auto tokens = tokens_of(1, kLength);
  for (const std::string& model : {kSixHeads, kNineHeads}) {
    RunOptions options{.directory = model, .isa = GetParam(), .weights = {1.0, 2.0}};
    const auto whole = run_steps(options, {{.slices = {{.sequence = 0, .tokens = tokens}}}});
    for (const int64_t chunk : {1, 37, 128}) {
      std::vector<TestStep> steps;
      for (int64_t begin = 0; begin < kLength; begin += chunk)
        steps.push_back({.slices = {{.sequence = 0,
                                     .begin = begin,
                                     .tokens = {tokens.begin() + begin,
                                                tokens.begin() + std::min(kLength, begin + chunk)}}}});
      EXPECT_TRUE(same_bits(run_steps(options, steps), whole)) << model << " by " << chunk;
    }
  }
}

TEST_P(Ranks, RowsNotSampledChangeNothing) {
  const RunOptions options{.directory = kSixHeads, .isa = GetParam(), .weights = {1, 1},
                           .sequences = 4};
  auto steps = mixed(4);
  const auto all = run_steps(options, steps);
  size_t prefill_rows = 0;
  std::vector<float> expected;
  const size_t vocab = kVocab;
  for (const TestSlice& slice : steps[0].slices) {
    prefill_rows += slice.tokens.size();
    expected.insert(expected.end(), all.begin() + static_cast<long>((prefill_rows - 1) * vocab),
                    all.begin() + static_cast<long>(prefill_rows * vocab));
  }
  expected.insert(expected.end(), all.begin() + static_cast<long>(prefill_rows * vocab), all.end());
  steps[0].sample_all = steps[1].sample_all = false;
  EXPECT_TRUE(same_bits(run_steps(options, steps), expected));
}

TEST_P(Ranks, ThreadsChangeNothing) {
  const auto steps = mixed(4);
  RunOptions options{.directory = kNineHeads, .isa = GetParam(), .weights = {1, 1},
                     .sequences = 4};
  const auto expected = run_steps(options, steps);
  options.threads = 3;
  EXPECT_TRUE(same_bits(run_steps(options, steps), expected));
}

// The paths of one numeric class agree with the reference of that class.
TEST_P(Ranks, PathsOfOneClassAgree) {
  const auto steps = mixed(3);
  for (const ops::Isa other : ops::available_isas()) {
    if (ops::numeric_class_of(other) != ops::numeric_class_of(GetParam())) continue;
    const RunOptions options{.directory = kSixHeads, .isa = GetParam(), .sequences = 3};
    RunOptions again = options;
    again.isa = other;
    EXPECT_TRUE(same_bits(run_steps(options, steps), run_steps(again, steps)))
        << ops::isa_name(other);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Ranks, ::testing::ValuesIn(ops::available_isas()),
                         [](const auto& info) { return std::string(ops::isa_name(info.param)); });

TEST(RanksRead, OnlyTheirShare) {
  RunOptions options{.directory = kNineHeads, .weights = {1, 2, 1}};
  std::vector<LoadStats> stats;
  options.load_stats = &stats;
  (void)run_steps(options, {{.slices = {{.sequence = 0, .tokens = {1, 2, 3}}}}});
  const ModelInfo info = read_model_info(kNineHeads);
  int64_t sum = 0;
  for (int rank = 0; rank < 3; ++rank) {
    const MemoryNeed need = memory_need(
        info, {.directory = kNineHeads, .max_step_tokens = 8, .max_step_rows = 8,
               .max_sequence = 64, .weights = options.weights, .rank = rank});
    EXPECT_EQ(stats[static_cast<size_t>(rank)].bytes_read, need.read_bytes);
    sum += need.read_bytes;
  }
  // KV heads that several ranks need and the norms are read by each of them.
  EXPECT_GE(sum, info.parameter_bytes);
  EXPECT_LE(sum, info.parameter_bytes * 11 / 10);
}

}  // namespace
}  // namespace phalanx::models
