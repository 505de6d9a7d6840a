#include "phalanx/layers/latent_attention.h"

#include <algorithm>

#include "phalanx/ops/moe.h"

namespace phalanx::layers {
namespace {

// [begin, end) of a run of rows that starts at `at`, counted from there.
Range within(Range rows, int64_t at, int64_t count) {
  const int64_t begin = std::clamp<int64_t>(rows.begin - at, 0, count);
  return {begin, std::max(begin, std::clamp<int64_t>(rows.end - at, 0, count))};
}

}  // namespace

LatentAttention::Scratch::Scratch(Carver& carver, const Shape& shape, int64_t own_heads,
                                  int64_t max_tokens, DType act)
    : compressed(carver.matrix(max_tokens, compressed_rows(shape), DType::kF32)),
      q_latent(carver.matrix(max_tokens, shape.q_lora_rank, act)),
      kv_latent(carver.matrix(max_tokens, shape.kv_lora_rank, act)),
      q(carver.matrix(max_tokens, own_heads * (shape.nope_head_dim + shape.rope_head_dim), act)),
      rows(carver.matrix(max_tokens, (own_heads + 1) * (shape.kv_lora_rank + shape.rope_head_dim),
                         act)),
      mixed(carver.matrix(max_tokens, own_heads * (shape.kv_lora_rank + shape.rope_head_dim), act)) {
}

LatentAttention::LatentAttention(WeightPlan& plan, const Shape& shape,
                                 std::span<const Range> query_heads,
                                 std::span<const Range> compressed_cut, DType act, int rank)
    : shape_(shape),
      own_heads_(query_heads[static_cast<size_t>(rank)].size()),
      row_(shape.kv_lora_rank + shape.rope_head_dim),
      compressed_(compressed_cut, 1, DType::kF32, rank),
      columns_(query_heads, shape.v_head_dim, act, rank) {
  const Range own = query_heads[static_cast<size_t>(rank)];
  const Range cut = compressed_cut[static_cast<size_t>(rank)];
  const int64_t kv_rows = shape.kv_lora_rank + shape.rope_head_dim;
  std::vector<RowSlice> compress;
  std::vector<RowSlice> biases;
  const auto add = [&](const std::string& name, int64_t at, int64_t rows) {
    const Range take = within(cut, at, rows);
    compress.push_back({shape.name + name + ".weight", rows, shape.hidden, take});
    biases.push_back({shape.name + name + ".bias", rows, 0, take});
  };
  if (shape.q_lora_rank > 0) add(".q_a_proj", 0, shape.q_lora_rank);
  add(".kv_a_proj_with_mqa", shape.q_lora_rank, kv_rows);
  compress_ = plan.linear(std::move(compress));
  if (shape.bias) compress_bias_ = plan.vector(std::move(biases));
  const auto norm = [&](const std::string& name, int64_t width) {
    return plan.vector({{shape.name + name + ".weight", width, 0, {0, width}}});
  };
  const int64_t head = shape.nope_head_dim + shape.rope_head_dim;
  const Range q_rows{own.begin * head, own.end * head};
  if (shape.q_lora_rank > 0) {
    q_norm_ = norm(".q_a_layernorm", shape.q_lora_rank);
    q_norm_bias_ = plan.norm_bias(shape.name + ".q_a_layernorm", shape.q_lora_rank);
    q_ = plan.linear(
        {{shape.name + ".q_b_proj.weight", shape.heads * head, shape.q_lora_rank, q_rows}});
  } else {
    q_ = plan.linear({{shape.name + ".q_proj.weight", shape.heads * head, shape.hidden, q_rows}});
  }
  kv_norm_ = norm(".kv_a_layernorm", shape.kv_lora_rank);
  kv_norm_bias_ = plan.norm_bias(shape.name + ".kv_a_layernorm", shape.kv_lora_rank);
  const int64_t period = shape.nope_head_dim + shape.v_head_dim;
  const RowSlice expand{shape.name + ".kv_b_proj.weight", shape.heads * period, shape.kv_lora_rank,
                        {own.begin * period, own.end * period}};
  key_ = plan.heads(expand, period, {0, shape.nope_head_dim}, true);
  value_ = plan.heads(expand, period, {shape.nope_head_dim, period}, false);
  attention_ = {.q_heads = own.size(),
                .q_head_begin = own.begin,
                .group = shape.heads,
                .kv_head_begin = 0,
                .head_dim = row_,
                .scale = static_cast<float>(shape.scale)};
}

void LatentAttention::forward(ops::Context& ctx, comm::Group& group, const MatrixView& x,
                              std::span<const int32_t> positions, std::span<const int32_t> slots,
                              std::span<const ops::SequenceSlice> sequences,
                              const ops::RopeTable& rope, const ops::KvLayer& kv,
                              const Scratch& scratch, const MatrixView& out) const {
  const int64_t tokens = x.rows;
  const MatrixView compressed = scratch.compressed.rows_of(0, tokens);
  if (compress_.rows > 0)
    ops::linear(ctx, x, compress_, compress_bias_, compressed_.own(compressed));
  compressed_.all_gather(group, compressed);
  if (own_heads_ == 0) return;

  // Rotary values first: rope_and_store rotates the leading ones of each head.
  const MatrixView rows = scratch.rows.rows_of(0, tokens);
  const MatrixView q = scratch.q.rows_of(0, tokens);
  const MatrixView latent = scratch.kv_latent.rows_of(0, tokens);
  if (q_norm_ != nullptr) {
    const MatrixView q_latent = scratch.q_latent.rows_of(0, tokens);
    ops::rms_norm(ctx, compressed.columns(0, shape_.q_lora_rank), q_norm_, shape_.norm_eps,
                  q_latent, q_norm_bias_);
    ops::linear(ctx, q_latent, q_, nullptr, q);
  } else {
    ops::linear(ctx, x, q_, nullptr, q);
  }
  const int64_t head = shape_.nope_head_dim + shape_.rope_head_dim;
  ops::head_linear(ctx, q, {.begin = 0, .period = head}, key_, rows,
                   {.begin = shape_.rope_head_dim, .period = row_});
  for (int64_t h = 0; h < own_heads_; ++h)
    ops::convert_rows(ctx, q.columns(h * head + shape_.nope_head_dim, shape_.rope_head_dim),
                      rows.columns(h * row_, shape_.rope_head_dim));
  ops::rms_norm(ctx, compressed.columns(shape_.q_lora_rank, shape_.kv_lora_rank), kv_norm_,
                shape_.norm_eps, latent, kv_norm_bias_);
  const MatrixView turning = compressed.columns(shape_.q_lora_rank + shape_.kv_lora_rank,
                                                shape_.rope_head_dim);
  const int64_t at = own_heads_ * row_;
  ops::convert_rows(ctx, turning, rows.columns(at, shape_.rope_head_dim));
  ops::convert_rows(ctx, latent, rows.columns(at + shape_.rope_head_dim, shape_.kv_lora_rank));
  if (shape_.interleaved)
    ops::prepare_heads(ctx, rows, {.begin = 0,
                                   .heads = own_heads_ + 1,
                                   .head_dim = row_,
                                   .interleaved = shape_.rope_head_dim});
  ops::rope_and_store(ctx, rows, own_heads_, rope, positions, slots, kv);
  const MatrixView mixed = scratch.mixed.rows_of(0, tokens);
  ops::attention(ctx, rows, sequences, attention_, kv, mixed);
  ops::head_linear(ctx, mixed, {.begin = shape_.rope_head_dim, .period = row_}, value_,
                   columns_.own(out), {.begin = 0, .period = shape_.v_head_dim});
}

}  // namespace phalanx::layers
