#pragma once

#include <span>
#include <string>

#include "phalanx/layers/cut_columns.h"
#include "phalanx/layers/memory.h"
#include "phalanx/layers/weight_plan.h"
#include "phalanx/ops/head_rows.h"
#include "phalanx/ops/heads.h"

namespace phalanx::layers {

// Multi-head latent attention (DeepSeek V2, https://arxiv.org/abs/2405.04434, 2.1) on this rank's
// query heads, in the absorbed form for all tokens, prompt or generated: kv_b_proj's keys are
// multiplied into the queries and its values into the output, so that attention runs over the
// compressed rows as they are cached, one head of [rotated key, latent] that all query heads and all
// ranks share.
class LatentAttention {
 public:
  struct Shape {
    std::string name;  // "model.layers.3.self_attn"
    int64_t hidden = 0;
    int64_t heads = 0;        // of the model
    int64_t q_lora_rank = 0;  // 0: queries straight from the hidden state
    int64_t kv_lora_rank = 0;
    int64_t nope_head_dim = 0;
    int64_t rope_head_dim = 0;
    int64_t v_head_dim = 0;
    bool bias = false;
    float norm_eps = 0;
    bool interleaved = false;  // pairs of the rotary values lie side by side
    double scale = 0;
  };
  // The activations of one step; lent.
  struct Scratch {
    Scratch(Carver& carver, const Shape& shape, int64_t own_heads, int64_t max_tokens, DType act);
    MatrixView compressed;  // f32 [T, q_lora_rank + kv_lora_rank + rope_head_dim], gathered
    MatrixView q_latent;    // act [T, q_lora_rank]
    MatrixView kv_latent;   // act [T, kv_lora_rank]
    MatrixView q;           // act [T, own heads * (nope + rope)]
    MatrixView rows;        // act [T, (own heads + 1) * row]
    MatrixView mixed;       // act [T, own heads * row]
  };
  // query_heads, compressed_cut: of each rank.
  LatentAttention(WeightPlan& plan, const Shape& shape, std::span<const Range> query_heads,
                  std::span<const Range> compressed_cut, DType act, int rank);

  [[nodiscard]] const CutColumns& columns() const { return columns_; }
  // Rows of the compressed projections, which are cut together.
  [[nodiscard]] static int64_t compressed_rows(const Shape& shape) {
    return shape.q_lora_rank + shape.kv_lora_rank + shape.rope_head_dim;
  }

  // x: [T, hidden]. out: act [T, heads * v_head_dim]; only own columns are written. Stores the rows
  // of all T tokens in kv (one head of kv_lora_rank + rope_head_dim, key and value at once).
  void forward(ops::Context& ctx, comm::Group& group, const MatrixView& x,
               std::span<const int32_t> positions, std::span<const int32_t> slots,
               std::span<const ops::SequenceSlice> sequences, const ops::RopeTable& rope,
               const ops::KvLayer& kv, const Scratch& scratch, const MatrixView& out) const;

 private:
  Shape shape_;
  int64_t own_heads_;
  int64_t row_;  // rope_head_dim + kv_lora_rank
  ops::PackedLinear compress_;
  const float* compress_bias_ = nullptr;
  CutColumns compressed_;
  const float* q_norm_ = nullptr;
  const float* kv_norm_ = nullptr;
  const float* q_norm_bias_ = nullptr;
  const float* kv_norm_bias_ = nullptr;
  ops::PackedLinear q_;
  ops::PackedHeads key_;    // [kv_lora_rank, nope] of each head
  ops::PackedHeads value_;  // [v, kv_lora_rank] of each head
  ops::AttentionShape attention_;
  CutColumns columns_;
};

}  // namespace phalanx::layers
