#pragma once

// Mixtures of experts: which experts a token goes to, tokens in the order of their experts, and the
// sum of what the experts say. Plain fp32 in one fixed order, the same on every path; the products
// are those of ops::linear over the rows of each expert.

#include <cstdint>
#include <span>
#include <vector>

#include "phalanx/ops/ops.h"

namespace phalanx::ops {

inline constexpr int64_t kMaxExperts = 1024;

// From the logits of a router to experts and their weights.
struct RoutingRule {
  enum class Score { kSoftmax, kSigmoid };
  // Of a group of experts: its best expert (DeepSeek V2), or the sum of its best two (V3).
  enum class GroupScore { kBest, kBestTwo };
  Score score = Score::kSoftmax;
  int64_t groups = 1;       // equal parts of the experts, of which only the best are open
  int64_t open_groups = 1;
  GroupScore group_score = GroupScore::kBest;
  bool normalise = false;   // weights of a token divided by their sum,
  float least_sum = 1e-20F; // but by no less than this
  float scale = 1.0F;       // then all weights times this
};

// Rows of a step, expert after expert; within one in the order of tokens.
struct ExpertRows {
  std::vector<int32_t> begin;    // [experts + 1] into tokens and weights
  std::vector<int32_t> tokens;   // [T * per_token]
  std::vector<float> weights;    // [T * per_token]
  // Scratch of route.
  std::vector<int32_t> chosen;   // [T, per_token], ascending
  std::vector<float> shares;     // [T, per_token]
  std::vector<int32_t> places;   // [T, per_token]: rows of the chosen, ascending

  // Room for max_tokens; nothing is allocated later.
  void reserve(int64_t max_tokens, int64_t experts, int64_t per_token);
  [[nodiscard]] static int64_t bytes(int64_t max_tokens, int64_t experts, int64_t per_token);
  [[nodiscard]] int64_t rows_of(int64_t expert) const {
    return begin[static_cast<size_t>(expert) + 1] - begin[static_cast<size_t>(expert)];
  }
};

// logits: f32 [T, experts]. correction: f32 [experts], added to the scores for the choice alone, or
// nullptr. The per_token best experts of each token by corrected score; equal scores go to the lower
// expert. Weights are those of the uncorrected scores.
void route(Context& ctx, const MatrixView& logits, const float* correction, const RoutingRule& rule,
           int64_t per_token, ExpertRows& rows);

// A layer of one expert, and its rows of x and out.
struct ExpertLinear {
  const PackedLinear* w = nullptr;
  tensor::Range rows;
};
struct ExpertGated {
  const PackedGated* w = nullptr;
  tensor::Range rows;
};
// out[rows] = linear(x[rows], w) of each expert: the same bits, but the weights of all experts are
// handed out to the threads together, and each passes by once for up to kTokenBlock rows. Rows are
// adjacent and ascend from expert to expert.
void linear_of_experts(Context& ctx, const MatrixView& x, std::span<const ExpertLinear> experts,
                       const MatrixView& out);
void gated_linear_of_experts(Context& ctx, const MatrixView& x,
                             std::span<const ExpertGated> experts, const MatrixView& out);

// out[i, :] = x[tokens[i], :], same dtype.
void take_rows(Context& ctx, const MatrixView& x, std::span<const int32_t> tokens,
               const MatrixView& out);
// sums[tokens[i], :] = sums[tokens[i], :] + weights[i] * y[i, :], the product rounded. f32. Tokens
// are distinct.
void add_weighted_rows(Context& ctx, const MatrixView& y, std::span<const int32_t> tokens,
                       std::span<const float> weights, const MatrixView& sums);
// sums[t, :] += weight * y[row - rows.begin, :] for the rows of each token within `rows`, in ascending
// order of its experts, each product and each sum rounded. f32.
void add_expert_rows(Context& ctx, const MatrixView& y, tensor::Range rows, const ExpertRows& of,
                     const MatrixView& sums);
void set_zero(Context& ctx, const MatrixView& x);
// out = x rounded to out.dtype, or widened to it. bf16 and f32.
void convert_rows(Context& ctx, const MatrixView& x, const MatrixView& out);
// 1 / (1 + exp(-x)) of each element of f32 [T, 1].
void sigmoid(const MatrixView& x);

}  // namespace phalanx::ops
