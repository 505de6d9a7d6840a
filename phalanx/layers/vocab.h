#pragma once

#include <span>
#include <string>
#include <vector>

#include "phalanx/layers/cut_columns.h"
#include "phalanx/layers/weight_plan.h"

namespace phalanx::layers {

// Embedding and head, both cut by vocabulary rows. Tied: one packed tensor serves both.
class Vocab {
 public:
  struct Shape {
    std::string embedding;  // "model.embed_tokens.weight"
    std::string head;       // "lm_head.weight"; unused when tied
    int64_t vocab = 0;
    int64_t hidden = 0;
    bool tied = false;
    std::string bias;  // of the head; empty: none
  };
  // cut: rows of each rank. max_tokens: largest T of embed.
  Vocab(WeightPlan& plan, const Shape& shape, std::span<const Range> cut, DType dtype,
        int64_t max_tokens, int rank);

  // Bytes of `exchange` for one token.
  [[nodiscard]] int64_t exchange_bytes() const { return row_bytes_; }
  // Bytes kept by this object for `max_tokens`.
  [[nodiscard]] static int64_t table_bytes(int64_t max_tokens) {
    return max_tokens * static_cast<int64_t>(sizeof(int32_t));
  }
  // out: f32 [T, hidden], the rows of the embedding exactly as stored. Each rank puts the rows it
  // owns into `exchange` (T * exchange_bytes()), one gather makes them known to all.
  void embed(ops::Context& ctx, comm::Group& group, std::span<const int32_t> tokens,
             std::byte* exchange, const MatrixView& out);

  // logits: f32 [R, vocab] on rank 0; on others [R, own_rows()].
  void head(ops::Context& ctx, comm::Group& group, const MatrixView& x,
            const MatrixView& logits) const;
  [[nodiscard]] int64_t own_rows() const { return head_.rows; }

 private:
  std::vector<Range> cut_;
  int rank_;
  DType dtype_;
  int64_t hidden_;
  int64_t row_bytes_;
  bool tied_;
  MatrixView embedding_;    // own rows as stored, unless tied
  ops::PackedLinear head_;  // own rows
  const float* bias_ = nullptr;
  CutColumns columns_;
  std::vector<int32_t> place_;           // of each token in the exchange
  std::vector<int64_t> next_;            // per rank: next place
  std::vector<int64_t> exchanged_bytes_; // per rank
};

}  // namespace phalanx::layers
