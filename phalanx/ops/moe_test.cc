#include "phalanx/ops/moe.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "phalanx/ops/head_rows.h"
#include "phalanx/ops/heads.h"
#include "phalanx/ops/test_data.h"

namespace phalanx::ops {
namespace {

ExpertRows routed(const std::vector<std::vector<float>>& logits, const RoutingRule& rule,
                  int64_t per_token, const float* correction = nullptr) {
  Runner runner(Isa::kRef, 2);
  Matrix m(DType::kF32, static_cast<int64_t>(logits.size()),
           static_cast<int64_t>(logits.front().size()));
  for (size_t t = 0; t < logits.size(); ++t)
    for (size_t e = 0; e < logits[t].size(); ++e)
      m.set(static_cast<int64_t>(t), static_cast<int64_t>(e), logits[t][e]);
  ExpertRows rows;
  rows.reserve(m.view().rows, m.view().cols, per_token);
  route(runner.ctx, m.view(), correction, rule, per_token, rows);
  return rows;
}

TEST(Route, SortsTokensByExpert) {
  const ExpertRows rows = routed({{0, 2, 1}, {3, 0, 1}, {0, 1, 2}}, {.normalise = true}, 2);
  EXPECT_EQ(rows.begin, (std::vector<int32_t>{0, 1, 3, 6}));
  EXPECT_EQ(rows.tokens, (std::vector<int32_t>{1, 0, 2, 0, 1, 2}));
  // exp(2) / (exp(2) + exp(1)) for token 0 and expert 1.
  EXPECT_NEAR(rows.weights[1], 0.7310586, 1e-6);
  EXPECT_NEAR(rows.weights[3], 0.2689414, 1e-6);
}

TEST(Route, WeightsAreOfAllExpertsUnlessNormalised) {
  const ExpertRows plain = routed({{0, 1, 2}}, {.scale = 2.0F}, 1);
  EXPECT_NEAR(plain.weights[0], 2.0 * std::exp(2.0) / (1 + std::exp(1.0) + std::exp(2.0)), 1e-6);
  const ExpertRows sigmoid =
      routed({{0, 1, 2}}, {.score = RoutingRule::Score::kSigmoid}, 1);
  EXPECT_NEAR(sigmoid.weights[0], 1.0 / (1.0 + std::exp(-2.0)), 1e-6);
}

TEST(Route, TiesGoToTheLowerExpert) {
  EXPECT_EQ(routed({{1, 1, 1, 1}}, {}, 2).chosen, (std::vector<int32_t>{0, 1}));
}

TEST(Route, CorrectionChangesTheChoiceAlone) {
  const float correction[] = {0, 0, 1};
  const ExpertRows rows =
      routed({{2, 0, -2}}, {.score = RoutingRule::Score::kSigmoid}, 1, correction);
  EXPECT_EQ(rows.chosen, (std::vector<int32_t>{2}));
  EXPECT_NEAR(rows.weights[0], 1.0 / (1.0 + std::exp(2.0)), 1e-6);
}

TEST(Route, OnlyTheBestGroupsAreOpen) {
  // Groups {4, -9}, {3, 3}, {2, 2}: by the best the first, by the best two the second.
  const std::vector<std::vector<float>> logits = {{4, -9, 3, 3, 2, 2}};
  const RoutingRule best{.score = RoutingRule::Score::kSigmoid, .groups = 3, .open_groups = 1};
  EXPECT_EQ(routed(logits, best, 2).chosen, (std::vector<int32_t>{0, 1}));
  RoutingRule two = best;
  two.group_score = RoutingRule::GroupScore::kBestTwo;
  EXPECT_EQ(routed(logits, two, 2).chosen, (std::vector<int32_t>{2, 3}));
  two.open_groups = 2;
  EXPECT_EQ(routed(logits, two, 3).chosen, (std::vector<int32_t>{2, 3, 4}));
}

TEST(Route, NotANumberStaysWithItsToken) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const ExpertRows rows = routed({{nan, nan, nan, nan}, {0, 3, 2, 1}}, {.groups = 2}, 2);
  EXPECT_NE(rows.chosen[0], rows.chosen[1]);
  EXPECT_EQ(rows.chosen[2], 0);  // the group {0, 3} has the best expert
  EXPECT_EQ(rows.chosen[3], 1);
  EXPECT_FALSE(std::isnan(rows.shares[2]));
}

TEST(Rows, TakenWeighedAndAdded) {
  Runner runner(Isa::kRef, 2);
  const Matrix x = random_matrix(DType::kBF16, 5, 7, 1);
  Matrix out(DType::kBF16, 2, 7);
  const std::vector<int32_t> tokens = {4, 1};
  take_rows(runner.ctx, x.view(), tokens, out.view());
  EXPECT_EQ(out.row_bits(0), x.row_bits(4));
  EXPECT_EQ(out.row_bits(1), x.row_bits(1));
  const Matrix y = random_matrix(DType::kF32, 2, 7, 2);
  Matrix sums(DType::kF32, 5, 7);
  set_zero(runner.ctx, sums.view());
  const std::vector<float> weights = {0.5F, -2.0F};
  add_weighted_rows(runner.ctx, y.view(), tokens, weights, sums.view());
  EXPECT_EQ(sums.get(4, 3), 0.5F * y.get(0, 3));
  EXPECT_EQ(sums.get(1, 6), -2.0F * y.get(1, 6));
  EXPECT_EQ(sums.get(0, 0), 0.0F);
}

TEST(Rows, OfExpertsAreAddedInAscendingOrder) {
  Runner runner(Isa::kRef, 2);
  ExpertRows rows = routed({{0, 2, 1}, {3, 0, 1}, {0, 1, 2}}, {}, 2);  // rows as SortsTokensByExpert
  EXPECT_EQ(rows.places, (std::vector<int32_t>{1, 3, 0, 4, 2, 5}));
  rows.weights = {1, 2, 3, 4, 5, 6};
  const Matrix y = random_matrix(DType::kF32, 6, 7, 2);
  Matrix sums(DType::kF32, 3, 7);
  set_zero(runner.ctx, sums.view());
  add_expert_rows(runner.ctx, y.view().rows_of(0, 3), {0, 3}, rows, sums.view());
  EXPECT_EQ(sums.get(2, 1), 3 * y.get(2, 1));
  add_expert_rows(runner.ctx, y.view().rows_of(3, 3), {3, 6}, rows, sums.view());
  EXPECT_EQ(sums.get(0, 6), 2 * y.get(1, 6) + 4 * y.get(3, 6));
  EXPECT_EQ(sums.get(1, 0), 1 * y.get(0, 0) + 5 * y.get(4, 0));
}

TEST(Heads, NormThenPairs) {
  Runner runner(Isa::kRef, 1);
  Matrix x = random_matrix(DType::kF32, 3, 2 + 2 * 6, 3);
  const Matrix before = x;
  const std::vector<float> norm = {1, 2, 3, 4, 5, 6};
  prepare_heads(runner.ctx, x.view(),
                {.begin = 2, .heads = 2, .head_dim = 6, .norm = norm.data(), .eps = 0.1F,
                 .interleaved = 4});
  const int64_t from[] = {0, 2, 1, 3, 4, 5};
  for (int64_t t = 0; t < 3; ++t) {
    EXPECT_EQ(x.get(t, 1), before.get(t, 1));
    for (int64_t h = 0; h < 2; ++h) {
      double sum = 0;
      for (int64_t i = 0; i < 6; ++i) sum += std::pow(before.get(t, 2 + h * 6 + i), 2);
      const double scale = 1.0 / std::sqrt(sum / 6 + 0.1);
      for (int64_t i = 0; i < 6; ++i)
        EXPECT_NEAR(x.get(t, 2 + h * 6 + i),
                    before.get(t, 2 + h * 6 + from[i]) * scale * norm[static_cast<size_t>(from[i])],
                    1e-5);
    }
  }
}

class HeadLinear : public ::testing::TestWithParam<Isa> {};

TEST_P(HeadLinear, GivesTheBitsOfALinearLayerPerHead) {
  constexpr int64_t kHeads = 3;
  constexpr int64_t kRows = 70;
  constexpr int64_t kK = 22;
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const int64_t tokens : {1, 50}) {
      Runner runner(GetParam(), 2);
      const PackedHeads shape{.heads = kHeads, .rows = kRows, .k = kK, .dtype = dtype,
                              .isa = GetParam()};
      const Aligned memory(kHeads * shape.head_bytes());
      PackedHeads w = shape;
      w.data = memory.data();
      for (int64_t h = 0; h < kHeads; ++h)
        pack_rows(random_matrix(dtype, kRows, kK, static_cast<uint32_t>(h)).view(), 0, kRows,
                  memory.data() + h * shape.head_bytes(), GetParam());
      const Matrix x = random_matrix(dtype, tokens, 5 + kHeads * 30, 9);
      Matrix out(dtype, tokens, 2 + kHeads * 80);
      head_linear(runner.ctx, x.view(), {.begin = 5, .period = 30}, w, out.view(),
                  {.begin = 2, .period = 80});
      Matrix expected(dtype, tokens, 2 + kHeads * 80);
      for (int64_t h = 0; h < kHeads; ++h)
        linear(runner.ctx, x.view().columns(5 + h * 30, kK), w.head(h), nullptr,
               expected.view().columns(2 + h * 80, kRows));
      EXPECT_EQ(out.bits(), expected.bits()) << tokens;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, HeadLinear, ::testing::ValuesIn(available_isas()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

}  // namespace
}  // namespace phalanx::ops
