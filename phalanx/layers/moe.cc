#include "phalanx/layers/moe.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>

namespace phalanx::layers {
namespace {

int64_t dtype_size(DType dtype) { return static_cast<int64_t>(tensor::dtype_bytes(dtype)); }

// CutColumns wants adjacent ranges; those of expert parallel runs are not.
std::vector<Range> adjacent_or_empty(const std::vector<Range>& ranges, bool used) {
  return used ? ranges : std::vector<Range>(ranges.size());
}

}  // namespace

int64_t Moe::Scratch::table_bytes(const Shape& shape, int64_t max_tokens) {
  const int64_t piece = std::min(max_tokens, kPiece);
  return ops::ExpertRows::bytes(piece, shape.experts, shape.per_token) + piece * 8 +
         shape.experts *
             static_cast<int64_t>(sizeof(ops::ExpertGated) + sizeof(ops::ExpertLinear));
}

Moe::Scratch::Scratch(Carver& carver, const Shape& shape, const ExpertLayout& layout,
                      int64_t max_tokens, DType act, int rank)
    : piece(std::min(max_tokens, layout.expert_parallel() ? kExpertParallelPiece : kPiece)),
      wide(carver.matrix(act == DType::kF32 ? 0 : piece, shape.hidden, DType::kF32)),
      logits(carver.matrix(piece, shape.experts, DType::kF32)),
      taken(carver.matrix(rows_at_once(piece, shape.per_token), shape.hidden, act)),
      inner(carver.matrix(piece * shape.per_token, shape.intermediate, act)),
      shared(carver.matrix(piece, shape.shared_intermediate, act)),
      shared_gate(carver.matrix(shape.shared_gate ? piece : 0, 1, DType::kF32)),
      outer(carver.matrix(rows_at_once(piece, shape.per_token),
                          std::max(layout.outer[static_cast<size_t>(rank)].size(),
                                   layout.hidden[static_cast<size_t>(rank)].size()),
                          DType::kF32)),
      sums(carver.matrix(piece, layout.hidden[static_cast<size_t>(rank)].size(), DType::kF32)) {
  if (layout.expert_parallel())
    exchange = carver.matrix(1,
                             piece * shape.per_token *
                                 std::max(shape.hidden * dtype_size(DType::kF32),
                                          shape.intermediate * dtype_size(act)),
                             DType::kU8);
  if (carver.measures()) return;
  rows.reserve(piece, shape.experts, shape.per_token);
  all_tokens.resize(static_cast<size_t>(piece));
  std::iota(all_tokens.begin(), all_tokens.end(), 0);
  ones.assign(static_cast<size_t>(piece), 1.0F);
  gated.reserve(static_cast<size_t>(shape.experts));
  linear.reserve(static_cast<size_t>(shape.experts));
}

Moe::Moe(WeightPlan& plan, const Shape& shape, const ExpertLayout& layout, DType act, int rank)
    : shape_(shape),
      layout_(layout),
      act_(act),
      rank_(static_cast<size_t>(rank)),
      inner_columns_(adjacent_or_empty(layout.inner, !layout.expert_parallel()), 1, act, rank),
      shared_columns_(layout.shared, 1, act, rank),
      hidden_columns_(layout.hidden, 1, act, rank) {
  const std::string& name = shape.name;
  router_ = plan.linear_f32({name + ".gate.weight", shape.experts, shape.hidden,
                             {0, shape.experts}});
  if (!shape.correction.empty())
    correction_ = plan.vector({{name + "." + shape.correction, shape.experts, 0,
                                {0, shape.experts}}});
  const Range inner = layout.inner[rank_];
  const Range outer = layout.outer[rank_];
  for (int64_t e = layout.experts[rank_].begin; e < layout.experts[rank_].end; ++e) {
    const std::string expert = fmt::format("{}.experts.{}.", name, e);
    experts_.push_back(
        {.gate_up = plan.gated({expert + shape.gate + ".weight", shape.intermediate, shape.hidden,
                                inner},
                               {expert + shape.up + ".weight", shape.intermediate, shape.hidden,
                                inner}),
         .down = plan.linear({{expert + shape.down + ".weight", shape.hidden, shape.intermediate,
                               outer}})});
  }
  if (shape.shared_intermediate == 0) return;
  const std::string shared = name + "." + shape.shared + ".";
  const Range rows = layout.shared[rank_];
  const Range hidden = layout.hidden[rank_];
  shared_gate_up_ = plan.gated(
      {shared + "gate_proj.weight", shape.shared_intermediate, shape.hidden, rows},
      {shared + "up_proj.weight", shape.shared_intermediate, shape.hidden, rows});
  shared_down_ =
      plan.linear({{shared + "down_proj.weight", shape.hidden, shape.shared_intermediate, hidden}});
  if (shape.shared_bias) {
    shared_gate_bias_ = plan.vector({{shared + "gate_proj.bias", shape.shared_intermediate, 0, rows}});
    shared_up_bias_ = plan.vector({{shared + "up_proj.bias", shape.shared_intermediate, 0, rows}});
    shared_down_bias_ = plan.vector({{shared + "down_proj.bias", shape.hidden, 0, hidden}});
  }
  if (shape.shared_gate)
    shared_gate_ = plan.linear_f32({name + "." + shape.shared + "_gate.weight", 1, shape.hidden,
                                    {0, 1}});
}

void Moe::forward(ops::Context& ctx, comm::Group& group, const MatrixView& x, Scratch& scratch,
                  const MatrixView& out) const {
  for (int64_t t = 0; t < x.rows; t += scratch.piece) {
    const int64_t count = std::min(scratch.piece, x.rows - t);
    run_piece(ctx, group, x.rows_of(t, count), scratch, out.rows_of(t, count));
  }
}

void Moe::route(ops::Context& ctx, const MatrixView& x, Scratch& scratch) const {
  MatrixView wide = x;
  if (act_ != DType::kF32) {
    wide = scratch.wide.rows_of(0, x.rows);
    ops::convert_rows(ctx, x, wide);
  }
  const MatrixView logits = scratch.logits.rows_of(0, x.rows);
  ops::linear(ctx, wide, router_, nullptr, logits);
  ops::route(ctx, logits, correction_, shape_.rule, shape_.per_token, scratch.rows);
  if (shape_.shared_gate) {
    const MatrixView gate = scratch.shared_gate.rows_of(0, x.rows);
    ops::linear(ctx, wide, shared_gate_, nullptr, gate);
    ops::sigmoid(gate);
  }
}

void Moe::run_piece(ops::Context& ctx, comm::Group& group, const MatrixView& x, Scratch& scratch,
                    const MatrixView& out) const {
  route(ctx, x, scratch);
  const MatrixView inner = run_inner(ctx, group, x, scratch);
  const MatrixView sums = scratch.sums.rows_of(0, x.rows);
  ops::set_zero(ctx, sums);
  if (layout_.expert_parallel())
    add_exchanged(ctx, group, inner, scratch, sums);
  else
    add_cut(ctx, inner, scratch, sums);
  if (shape_.shared_intermediate > 0) add_shared(ctx, group, x, scratch, sums);
  ops::convert_rows(ctx, sums, hidden_columns_.own(out));
  hidden_columns_.all_gather(group, out);
}

int64_t Moe::together(const ops::ExpertRows& rows, int64_t begin, int64_t end, int64_t most) {
  int64_t count = 0;
  int64_t e = begin;
  while (e < end && count + rows.rows_of(e) <= most) count += rows.rows_of(e++);
  PHALANX_CHECK(e > begin || begin == end);
  return e;
}

MatrixView Moe::run_inner(ops::Context& ctx, comm::Group& group, const MatrixView& x,
                          Scratch& scratch) const {
  const ops::ExpertRows& rows = scratch.rows;
  const Range experts = experts_of(rank_);
  const Range own = layout_.inner[rank_];
  const auto row_of = [&](int64_t e) {
    return static_cast<int64_t>(rows.begin[static_cast<size_t>(e)]);
  };
  const int64_t first = row_of(experts.begin);
  const int64_t count = row_of(experts.end) - first;
  const MatrixView whole = scratch.inner.rows_of(0, count);
  const MatrixView mine = whole.columns(own.begin, own.size());
  if (own.size() > 0) {
    for (int64_t begin = experts.begin; begin < experts.end;) {
      const int64_t end = together(rows, begin, experts.end, scratch.taken.rows);
      const int64_t at = row_of(begin);
      const int64_t n = row_of(end) - at;
      const MatrixView taken = scratch.taken.rows_of(0, n);
      ops::take_rows(ctx, x, std::span(rows.tokens).subspan(static_cast<size_t>(at),
                                                            static_cast<size_t>(n)),
                     taken);
      scratch.gated.clear();
      for (int64_t e = begin; e < end; ++e)
        scratch.gated.push_back({.w = &experts_[static_cast<size_t>(e - experts.begin)].gate_up,
                                 .rows = {row_of(e) - at, row_of(e + 1) - at}});
      ops::gated_linear_of_experts(ctx, taken, scratch.gated, mine.rows_of(at - first, n));
      begin = end;
    }
  }
  if (!layout_.expert_parallel()) {
    inner_columns_.all_gather(group, whole);
    return whole;
  }
  if (layout_.moe_tp == 1) return whole;
  // Every rank's [rows of its experts, own columns], one after the other.
  const int64_t size = dtype_size(act_);
  std::vector<int64_t> bytes;
  std::vector<int64_t> at;
  int64_t end = 0;
  for (size_t r = 0; r < layout_.experts.size(); ++r) {
    const Range theirs = experts_of(r);
    at.push_back(end);
    bytes.push_back((row_of(theirs.end) - row_of(theirs.begin)) * layout_.inner[r].size() * size);
    end += bytes.back();
  }
  auto* exchange = static_cast<std::byte*>(scratch.exchange.data);
  for (int64_t i = 0; i < count; ++i)
    if (own.size() > 0)
      std::memcpy(exchange + at[rank_] + i * own.size() * size, mine.rows_of(i, 1).data,
                  static_cast<size_t>(own.size() * size));
  group.all_gather(exchange, 1, bytes);
  const size_t run = rank_ / static_cast<size_t>(layout_.moe_tp) * static_cast<size_t>(layout_.moe_tp);
  for (size_t r = run; r < run + static_cast<size_t>(layout_.moe_tp); ++r) {
    const Range theirs = layout_.inner[r];
    if (r == rank_ || theirs.size() == 0) continue;
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(whole.columns(theirs.begin, theirs.size()).rows_of(i, 1).data,
                  exchange + at[r] + i * theirs.size() * size,
                  static_cast<size_t>(theirs.size() * size));
  }
  return whole;
}

void Moe::list_down(int64_t begin, int64_t end, Scratch& scratch) const {
  const auto row_of = [&](int64_t e) {
    return int64_t{scratch.rows.begin[static_cast<size_t>(e)]} -
           scratch.rows.begin[static_cast<size_t>(begin)];
  };
  scratch.linear.clear();
  for (int64_t e = begin; e < end; ++e)
    scratch.linear.push_back(
        {.w = &experts_[static_cast<size_t>(e - experts_of(rank_).begin)].down,
         .rows = {row_of(e), row_of(e + 1)}});
}

void Moe::add_cut(ops::Context& ctx, const MatrixView& inner, Scratch& scratch,
                  const MatrixView& sums) const {
  const ops::ExpertRows& rows = scratch.rows;
  if (sums.cols == 0) return;
  for (int64_t begin = 0; begin < shape_.experts;) {
    const int64_t end = together(rows, begin, shape_.experts, scratch.outer.rows);
    const Range own{rows.begin[static_cast<size_t>(begin)], rows.begin[static_cast<size_t>(end)]};
    const MatrixView outer{.data = scratch.outer.data, .dtype = DType::kF32, .rows = own.size(),
                           .cols = sums.cols, .stride = sums.cols};
    list_down(begin, end, scratch);
    ops::linear_of_experts(ctx, inner.rows_of(own.begin, own.size()), scratch.linear, outer);
    ops::add_expert_rows(ctx, outer, own, rows, sums);
    begin = end;
  }
}

void Moe::add_exchanged(ops::Context& ctx, comm::Group& group, const MatrixView& inner,
                        Scratch& scratch, const MatrixView& sums) const {
  const ops::ExpertRows& rows = scratch.rows;
  const auto row_of = [&](int64_t e) {
    return static_cast<int64_t>(rows.begin[static_cast<size_t>(e)]);
  };
  // Every rank's f32 [rows of its experts, own rows of down], one after the other.
  const size_t ranks = layout_.experts.size();
  std::vector<int64_t> bytes;
  std::vector<int64_t> at;
  int64_t end = 0;
  for (size_t r = 0; r < ranks; ++r) {
    const Range theirs = experts_of(r);
    at.push_back(end);
    bytes.push_back((row_of(theirs.end) - row_of(theirs.begin)) * layout_.outer[r].size() *
                    dtype_size(DType::kF32));
    end += bytes.back();
  }
  auto* exchange = static_cast<std::byte*>(scratch.exchange.data);
  // Rows of expert e, an expert of rank r, as that rank has put them there.
  const auto outer_of = [&](size_t r, int64_t e) {
    const int64_t cols = layout_.outer[r].size();
    return MatrixView{
        .data = exchange + at[r] +
                (row_of(e) - row_of(experts_of(r).begin)) * cols * dtype_size(DType::kF32),
        .dtype = DType::kF32, .rows = rows.rows_of(e), .cols = cols, .stride = cols};
  };
  const Range experts = experts_of(rank_);
  const int64_t cols = layout_.outer[rank_].size();
  if (experts.size() > 0 && cols > 0) {
    list_down(experts.begin, experts.end, scratch);
    ops::linear_of_experts(ctx, inner, scratch.linear,
                           {.data = exchange + at[rank_], .dtype = DType::kF32, .rows = inner.rows,
                            .cols = cols, .stride = cols});
  }
  group.all_gather(exchange, 1, bytes);
  const Range hidden = layout_.hidden[rank_];
  for (int64_t e = 0; e < shape_.experts; ++e) {
    const int64_t n = rows.rows_of(e);
    if (n == 0) continue;
    const auto first = static_cast<size_t>(row_of(e));
    for (size_t r = 0; r < ranks; ++r) {
      const Range theirs = layout_.outer[r];
      const int64_t begin = std::max(theirs.begin, hidden.begin);
      const int64_t stop = std::min(theirs.end, hidden.end);
      if (!experts_of(r).contains(e) || begin >= stop) continue;
      ops::add_weighted_rows(
          ctx, outer_of(r, e).columns(begin - theirs.begin, stop - begin),
          std::span(rows.tokens).subspan(first, static_cast<size_t>(n)),
          std::span(rows.weights).subspan(first, static_cast<size_t>(n)),
          sums.columns(begin - hidden.begin, stop - begin));
    }
  }
}

void Moe::add_shared(ops::Context& ctx, comm::Group& group, const MatrixView& x, Scratch& scratch,
                     const MatrixView& sums) const {
  const MatrixView inner = scratch.shared.rows_of(0, x.rows);
  if (shared_gate_up_.rows > 0)
    ops::gated_linear(ctx, x, shared_gate_up_, shared_gate_bias_, shared_up_bias_,
                      shared_columns_.own(inner));
  shared_columns_.all_gather(group, inner);
  if (sums.cols == 0) return;
  const MatrixView outer{.data = scratch.outer.data, .dtype = DType::kF32, .rows = x.rows,
                         .cols = sums.cols, .stride = sums.cols};
  ops::linear(ctx, inner, shared_down_, shared_down_bias_, outer);
  const auto count = static_cast<size_t>(x.rows);
  std::span<const float> weights(scratch.ones.data(), count);
  if (shape_.shared_gate)
    weights = {static_cast<const float*>(scratch.shared_gate.data), count};
  ops::add_weighted_rows(ctx, outer, std::span(scratch.all_tokens).first(count), weights, sums);
}

}  // namespace phalanx::layers
