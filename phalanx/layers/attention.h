#pragma once

#include <span>
#include <string>

#include "phalanx/layers/cut_columns.h"
#include "phalanx/layers/lora.h"
#include "phalanx/layers/weight_plan.h"
#include "phalanx/ops/head_rows.h"

namespace phalanx::layers {

// Grouped-query attention on this rank's query heads: q, k and v projections, rotary embedding, the
// paged cache and the softmax. The output projection is a ShardedLinear of its own, since its input
// must be whole.
class Attention {
 public:
  struct Shape {
    std::string name;  // "model.layers.3.self_attn"
    int64_t hidden = 0;
    int64_t heads = 0;     // of the model
    int64_t kv_heads = 0;  // of the model
    int64_t head_dim = 0;
    bool bias = false;
    bool norm = false;         // RMS norm over each head of q and k
    float norm_eps = 0;
    int64_t interleaved = 0;   // leading values of a head whose pairs lie side by side
    double scale = 0;          // of the scores
    int64_t window = 0;        // sliding window in positions, 0 = none
    bool kv_scales = false;    // of an int8 cache, per channel, are stored
    bool kv_offsets = false;
  };
  // query_heads: of each rank, in heads. kv_heads: stored on this rank.
  Attention(WeightPlan& plan, const Shape& shape, std::span<const Range> query_heads,
            Range kv_heads, DType act, int rank);

  // Columns of this rank's q, k and v.
  [[nodiscard]] int64_t qkv_columns() const { return qkv_.rows; }
  [[nodiscard]] const CutColumns& columns() const { return columns_; }

  // x: [T, hidden]. qkv: act [T, qkv_columns()], overwritten. out: act [T, heads * head_dim]; only
  // own columns are written. Stores K and V of all T tokens; an int8 cache without scales of its own
  // takes the checkpoint's.
  void forward(ops::Context& ctx, const MatrixView& x, std::span<const int32_t> positions,
               std::span<const int32_t> slots, std::span<const ops::SequenceSlice> sequences,
               const ops::RopeTable& rope, const ops::KvLayer& kv, const MatrixView& qkv,
               const MatrixView& out, const LoraSite& lora) const;

 private:
  ops::PackedLinear qkv_;
  const float* bias_ = nullptr;
  const float* k_scale_ = nullptr;  // [kv heads stored here * head_dim]
  const float* v_scale_ = nullptr;
  const float* k_offset_ = nullptr;
  const float* v_offset_ = nullptr;
  ops::HeadRows q_rows_;
  ops::HeadRows k_rows_;
  ops::AttentionShape attention_;
  CutColumns columns_;
};

}  // namespace phalanx::layers
