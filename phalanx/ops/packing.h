#pragma once

// The packed layout of weights, the same for all paths so far:
//   bf16      [panel][k / 2][16][2]   pairs of neighbouring k, as vdpbf16ps wants them
//   f16, f32  [panel][k][16]
// k padded to an even number, rows to whole panels of 16, with zeros.

#include <cstddef>
#include <cstdint>

#include "phalanx/tensor/cut.h"
#include "phalanx/tensor/dtype.h"

namespace phalanx::ops {

[[nodiscard]] constexpr int64_t panels_of(int64_t rows) {
  return (rows + tensor::kPanelRows - 1) / tensor::kPanelRows;
}

[[nodiscard]] constexpr int64_t panel_bytes(int64_t k, tensor::DType dtype) {
  return (k + k % 2) * tensor::kPanelRows * static_cast<int64_t>(tensor::dtype_bytes(dtype));
}

// Index of element (row, k) of a panel, in elements.
[[nodiscard]] constexpr int64_t panel_index(int64_t row, int64_t k, tensor::DType dtype) {
  if (dtype == tensor::DType::kBF16) return (k / 2 * tensor::kPanelRows + row) * 2 + k % 2;
  return k * tensor::kPanelRows + row;
}

}  // namespace phalanx::ops
