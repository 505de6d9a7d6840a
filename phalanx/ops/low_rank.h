#pragma once

// What an adapter (LoRA, https://arxiv.org/abs/2106.09685) adds to linear layers: B A x, for some
// rows of a step. One order as everywhere: a row's sum does not depend on the rows beside it.

#include "phalanx/ops/ops.h"

namespace phalanx::ops {

// Rows that one call takes.
inline constexpr int64_t kLowRankRows = 128;
// Tokens whose gate and up are kept apart at once.
inline constexpr int64_t kGatedSumRows = 128;

// Packed as any linear layer, of f32.
struct LowRankPart {
  const PackedLinear* a = nullptr;  // [r, k]
  const PackedLinear* b = nullptr;  // [n, r]
  // act or f32. Output column n lies at n / 16 * panel_stride + n % 16: 16, or 32 for one half of
  // gated_sums' result.
  MatrixView out;
  int64_t panel_stride = tensor::kPanelRows;
};

// Lent memory, 64-aligned.
struct LowRankScratch {
  float* inputs = nullptr;   // [kLowRankRows][max_k]
  float* reduced = nullptr;  // [kLowRankRows][reduced_stride]
  int64_t max_k = 0;         // a multiple of 16
  int64_t reduced_stride = 0;  // the ranks of all parts of a call, each rounded up to 16
};

// out[rows[i] - first] = round(out[rows[i] - first] + B A x[rows[i]]), for every part. rows: up to
// kLowRankRows, ascending. x: act or f32. A x and B (A x) are f32.
void low_rank(Context& ctx, const MatrixView& x, std::span<const int32_t> rows, int64_t first,
              std::span<const LowRankPart> parts, const LowRankScratch& scratch);

// gated_linear in two steps, so that something can be added before silu: together its bits.
// sums: f32 [T, 2 * n rounded up to 16], without gaps: 16 gates, 16 ups, ... half: f32 [T, n],
// without gaps, for layers of two formats.
void gated_sums(Context& ctx, const MatrixView& x, const PackedGated& w, const MatrixView& sums,
                const MatrixView& half);
// out[T, n] = round_act(silu(gate) * up).
void gated_finish(Context& ctx, const MatrixView& sums, const PackedGated& w,
                  const float* gate_bias, const float* up_bias, const MatrixView& out);

}  // namespace phalanx::ops
