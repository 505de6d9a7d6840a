#pragma once

#include <cstdint>

#include "phalanx/ops/ops.h"

namespace phalanx::ops {

// The widest head that prepare_heads and head_linear take.
inline constexpr int64_t kMaxHeadWidth = 1024;

// Heads of head_dim columns each, from column `begin` of a matrix on, before they are rotated.
struct HeadRows {
  int64_t begin = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;
  // RMS norm over each head, f32 [head_dim]; nullptr: none.
  const float* norm = nullptr;
  float eps = 0;
  // The first `interleaved` values of a head hold pairs that rotate together side by side: the
  // first of each pair goes to the first half, the second to the second, as rope_and_store wants
  // them. 0: they lie so already.
  int64_t interleaved = 0;
};

// In place: norm (rounded to x.dtype), then the order of pairs. x: act. The sum of squares is taken
// in 16 lanes and the tree 8-4-2-1, the same on every path.
void prepare_heads(Context& ctx, const MatrixView& x, const HeadRows& rows);

}  // namespace phalanx::ops
