#pragma once

#include <cstdint>

#include "phalanx/ops/ops.h"

namespace phalanx::ops {

// One small matrix [rows, k] per head, each packed as a PackedLinear, one after the other.
struct PackedHeads {
  const std::byte* data = nullptr;
  int64_t heads = 0;
  int64_t rows = 0;
  int64_t k = 0;
  DType dtype = DType::kBF16;  // bf16 or f32
  Isa isa = Isa::kRef;

  [[nodiscard]] int64_t head_bytes() const { return packed_bytes(rows, k, dtype, isa); }
  [[nodiscard]] PackedLinear head(int64_t h) const {
    return {.data = data + h * head_bytes(), .rows = rows, .k = k, .dtype = dtype, .isa = isa};
  }
};

// First column of head h in a matrix: begin + h * period.
struct HeadColumns {
  int64_t begin = 0;
  int64_t period = 0;
};

// For every head h: out[T, rows] = x[T, k] * W_h^T at its columns, rounded to out.dtype once. Each
// output is the sum that ops::linear would give. x: act (bf16 with bf16 weights, else f32).
void head_linear(Context& ctx, const MatrixView& x, HeadColumns x_columns, const PackedHeads& w,
                 const MatrixView& out, HeadColumns out_columns);

}  // namespace phalanx::ops
