#include "phalanx/ops/moe.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "phalanx/base/check.h"
#include "phalanx/ops/ref/element.h"
#include "phalanx/ops/ref/ref.h"

namespace phalanx::ops {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

int64_t grain(int64_t cols) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cols)); }

float sigmoid_of(float x) { return 1.0F / (1.0F + ref::exp32(-x)); }

// Scores of one token in place of its logits.
void score(std::span<float> values, RoutingRule::Score kind) {
  if (kind == RoutingRule::Score::kSigmoid) {
    for (float& v : values) v = sigmoid_of(v);
    return;
  }
  const float max = *std::max_element(values.begin(), values.end());
  float sum = 0;
  for (float& v : values) {
    v = ref::exp32(v - max);
    sum += v;
  }
  for (float& v : values) v /= sum;
}

// Marks the index of the largest value that was not taken before; the lowest of equals. NaN is
// taken last, so that whatever the values, no index comes twice.
size_t take_largest(std::span<const float> values, bool* taken) {
  size_t best = values.size();
  for (size_t i = 0; i < values.size(); ++i)
    if (!taken[i] && (best == values.size() || values[i] > values[best])) best = i;
  taken[best] = true;
  return best;
}

// Closes all groups but the best: their experts get the lowest score.
void close_groups(std::span<float> scores, const RoutingRule& rule, std::span<float> group_scores) {
  const auto groups = static_cast<size_t>(rule.groups);
  const size_t size = scores.size() / groups;
  for (size_t g = 0; g < groups; ++g) {
    const std::span<float> group = scores.subspan(g * size, size);
    float best = kLowest;
    float second = kLowest;
    for (const float s : group) {
      if (s > best) {
        second = best;
        best = s;
      } else if (s > second) {
        second = s;
      }
    }
    group_scores[g] =
        rule.group_score == RoutingRule::GroupScore::kBest || size == 1 ? best : best + second;
  }
  bool open[kMaxExperts] = {};
  for (int64_t i = 0; i < rule.open_groups; ++i)
    (void)take_largest(group_scores, open);
  for (size_t g = 0; g < groups; ++g)
    if (!open[g]) std::fill_n(scores.begin() + static_cast<long>(g * size), size, kLowest);
}

}  // namespace

void ExpertRows::reserve(int64_t max_tokens, int64_t experts, int64_t per_token) {
  const auto rows = static_cast<size_t>(max_tokens * per_token);
  begin.reserve(static_cast<size_t>(experts) + 1);
  tokens.reserve(rows);
  weights.reserve(rows);
  chosen.reserve(rows);
  shares.reserve(rows);
  places.reserve(rows);
}

int64_t ExpertRows::bytes(int64_t max_tokens, int64_t experts, int64_t per_token) {
  return 4 * (experts + 1 + 5 * max_tokens * per_token);
}

void route(Context& ctx, const MatrixView& logits, const float* correction, const RoutingRule& rule,
           int64_t per_token, ExpertRows& rows) {
  const int64_t experts = logits.cols;
  PHALANX_CHECK(logits.dtype == DType::kF32 && per_token > 0 && per_token <= experts &&
                experts <= kMaxExperts);
  PHALANX_CHECK(rule.groups > 0 && experts % rule.groups == 0 && rule.open_groups > 0 &&
                rule.open_groups <= rule.groups &&
                per_token <= experts / rule.groups * rule.open_groups);
  const auto count = static_cast<size_t>(logits.rows * per_token);
  rows.chosen.resize(count);
  rows.shares.resize(count);
  ctx.pool().for_each(logits.rows, grain(experts * per_token), [&](int64_t t) {
    float scores[kMaxExperts];
    float choice[kMaxExperts];
    float groups[kMaxExperts];
    const auto n = static_cast<size_t>(experts);
    std::copy_n(logits.row<const float>(t), n, scores);
    score({scores, n}, rule.score);
    for (size_t e = 0; e < n; ++e)
      choice[e] = correction != nullptr ? scores[e] + correction[e] : scores[e];
    if (rule.groups > 1)
      close_groups({choice, n}, rule, {groups, static_cast<size_t>(rule.groups)});
    int32_t* chosen = rows.chosen.data() + t * per_token;
    float* shares = rows.shares.data() + t * per_token;
    bool taken[kMaxExperts] = {};
    for (int64_t i = 0; i < per_token; ++i)
      chosen[i] = static_cast<int32_t>(take_largest({choice, n}, taken));
    std::sort(chosen, chosen + per_token);
    float sum = 0;
    for (int64_t i = 0; i < per_token; ++i) {
      shares[i] = scores[chosen[i]];
      sum += shares[i];
    }
    sum = std::max(sum, rule.least_sum);
    for (int64_t i = 0; i < per_token; ++i) {
      if (rule.normalise) shares[i] /= sum;
      shares[i] *= rule.scale;
    }
  });

  rows.begin.assign(static_cast<size_t>(experts) + 1, 0);
  for (const int32_t e : rows.chosen) ++rows.begin[static_cast<size_t>(e) + 1];
  std::partial_sum(rows.begin.begin(), rows.begin.end(), rows.begin.begin());
  rows.tokens.resize(count);
  rows.weights.resize(count);
  rows.places.resize(count);
  int32_t next[kMaxExperts];
  std::copy_n(rows.begin.begin(), experts, next);
  for (size_t i = 0; i < count; ++i) {
    rows.places[i] = next[rows.chosen[i]]++;
    const auto to = static_cast<size_t>(rows.places[i]);
    rows.tokens[to] = static_cast<int32_t>(static_cast<int64_t>(i) / per_token);
    rows.weights[to] = rows.shares[i];
  }
}

void take_rows(Context& ctx, const MatrixView& x, std::span<const int32_t> tokens,
               const MatrixView& out) {
  PHALANX_CHECK(out.rows == static_cast<int64_t>(tokens.size()) && out.cols == x.cols &&
                out.dtype == x.dtype);
  const size_t bytes = static_cast<size_t>(x.cols) * tensor::dtype_bytes(x.dtype);
  ctx.pool().for_each(out.rows, grain(x.cols), [&](int64_t i) {
    std::memcpy(out.rows_of(i, 1).data, x.rows_of(tokens[static_cast<size_t>(i)], 1).data, bytes);
  });
}

void add_weighted_rows(Context& ctx, const MatrixView& y, std::span<const int32_t> tokens,
                       std::span<const float> weights, const MatrixView& sums) {
  PHALANX_CHECK(y.dtype == DType::kF32 && sums.dtype == DType::kF32 && y.cols == sums.cols);
  PHALANX_CHECK(y.rows == static_cast<int64_t>(tokens.size()) && weights.size() == tokens.size());
  ctx.pool().for_each(y.rows, grain(y.cols), [&](int64_t i) {
    const float* from = y.row<const float>(i);
    float* to = sums.row<float>(tokens[static_cast<size_t>(i)]);
    const float w = weights[static_cast<size_t>(i)];
    for (int64_t c = 0; c < y.cols; ++c) to[c] += w * from[c];
  });
}

void add_expert_rows(Context& ctx, const MatrixView& y, tensor::Range rows, const ExpertRows& of,
                     const MatrixView& sums) {
  PHALANX_CHECK(y.dtype == DType::kF32 && sums.dtype == DType::kF32 && y.cols == sums.cols);
  PHALANX_CHECK(y.rows == rows.size() && sums.rows > 0);
  const auto per_token = static_cast<int64_t>(of.places.size()) / sums.rows;
  ctx.pool().for_each(sums.rows, grain(y.cols * per_token), [&](int64_t t) {
    float* to = sums.row<float>(t);
    for (int64_t i = t * per_token; i < (t + 1) * per_token; ++i) {
      const int64_t row = of.places[static_cast<size_t>(i)];
      if (!rows.contains(row)) continue;
      const float* from = y.row<const float>(row - rows.begin);
      const float w = of.weights[static_cast<size_t>(row)];
      for (int64_t c = 0; c < y.cols; ++c) to[c] += w * from[c];
    }
  });
}

void set_zero(Context& ctx, const MatrixView& x) {
  const size_t bytes = static_cast<size_t>(x.cols) * tensor::dtype_bytes(x.dtype);
  ctx.pool().for_each(x.rows, grain(x.cols),
                      [&](int64_t t) { std::memset(x.rows_of(t, 1).data, 0, bytes); });
}

void convert_rows(Context& ctx, const MatrixView& x, const MatrixView& out) {
  PHALANX_CHECK(x.rows == out.rows && x.cols == out.cols);
  ctx.pool().for_each(x.rows, grain(x.cols), [&](int64_t t) {
    for (int64_t c = 0; c < x.cols; ++c)
      ref::store(out.data, out.dtype, t * out.stride + c,
                 ref::load(x.data, x.dtype, t * x.stride + c));
  });
}

void sigmoid(const MatrixView& x) {
  PHALANX_CHECK(x.dtype == DType::kF32 && x.cols == 1);
  for (int64_t t = 0; t < x.rows; ++t) *x.row<float>(t) = sigmoid_of(*x.row<float>(t));
}

}  // namespace phalanx::ops
