#include "phalanx/layers/attention.h"

namespace phalanx::layers {

Attention::Attention(WeightPlan& plan, const Shape& shape, std::span<const Range> query_heads,
                     Range kv_heads, DType act, int rank)
    : columns_(query_heads, shape.head_dim, act, rank) {
  const int64_t d = shape.head_dim;
  const Range heads = query_heads[static_cast<size_t>(rank)];
  const Range q{heads.begin * d, heads.end * d};
  const Range kv{kv_heads.begin * d, kv_heads.end * d};
  const std::string q_name = shape.name + ".q_proj";
  const std::string k_name = shape.name + ".k_proj";
  const std::string v_name = shape.name + ".v_proj";
  qkv_ = plan.linear({{q_name + ".weight", shape.heads * d, shape.hidden, q},
                      {k_name + ".weight", shape.kv_heads * d, shape.hidden, kv},
                      {v_name + ".weight", shape.kv_heads * d, shape.hidden, kv}});
  if (shape.bias)
    bias_ = plan.vector({{q_name + ".bias", shape.heads * d, 0, q},
                         {k_name + ".bias", shape.kv_heads * d, 0, kv},
                         {v_name + ".bias", shape.kv_heads * d, 0, kv}});
  const auto of_cache = [&](const std::string& name, WeightPlan::Values values) {
    return plan.vector({{name, shape.kv_heads * d, 0, kv}}, values);
  };
  if (shape.kv_scales) {
    k_scale_ = of_cache(k_name + ".kv_cache_scale", WeightPlan::Values::kPositive);
    v_scale_ = of_cache(v_name + ".kv_cache_scale", WeightPlan::Values::kPositive);
  }
  if (shape.kv_scales && shape.kv_offsets) {
    k_offset_ = of_cache(k_name + ".kv_cache_offset", WeightPlan::Values::kFinite);
    v_offset_ = of_cache(v_name + ".kv_cache_offset", WeightPlan::Values::kFinite);
  }
  q_rows_ = {.heads = heads.size(),
             .head_dim = d,
             .eps = shape.norm_eps,
             .interleaved = shape.interleaved};
  k_rows_ = q_rows_;
  k_rows_.begin = heads.size() * d;
  k_rows_.heads = kv_heads.size();
  if (shape.norm) {
    q_rows_.norm = plan.vector({{shape.name + ".q_norm.weight", d, 0, {0, d}}});
    k_rows_.norm = plan.vector({{shape.name + ".k_norm.weight", d, 0, {0, d}}});
  }
  attention_ = {.q_heads = heads.size(),
                .q_head_begin = heads.begin,
                .group = shape.heads / shape.kv_heads,
                .kv_head_begin = kv_heads.begin,
                .head_dim = d,
                .scale = static_cast<float>(shape.scale),
                .window = shape.window};
}

void Attention::forward(ops::Context& ctx, const MatrixView& x, std::span<const int32_t> positions,
                        std::span<const int32_t> slots,
                        std::span<const ops::SequenceSlice> sequences, const ops::RopeTable& rope,
                        const ops::KvLayer& cache, const MatrixView& qkv,
                        const MatrixView& out, const LoraSite& lora) const {
  if (attention_.q_heads == 0) return;
  ops::KvLayer kv = cache;
  if (kv.dtype == DType::kI8 && kv.k_row_scale == nullptr) {
    kv.k_scale = k_scale_;
    kv.v_scale = v_scale_;
    kv.k_offset = k_offset_;
    kv.v_offset = v_offset_;
  }
  ops::linear(ctx, x, qkv_, bias_, qkv);
  const int64_t q_columns = q_rows_.heads * q_rows_.head_dim;
  const int64_t kv_columns = k_rows_.heads * k_rows_.head_dim;
  lora.add(ctx, x,
           {{&LoraLayer::q, qkv.columns(0, q_columns)},
            {&LoraLayer::k, qkv.columns(q_columns, kv_columns)},
            {&LoraLayer::v, qkv.columns(q_columns + kv_columns, kv_columns)}});
  ops::prepare_heads(ctx, qkv, q_rows_);
  ops::prepare_heads(ctx, qkv, k_rows_);
  ops::rope_and_store(ctx, qkv, attention_.q_heads, rope, positions, slots, kv);
  ops::attention(ctx, qkv, sequences, attention_, kv, columns_.own(out));
}

}  // namespace phalanx::layers
