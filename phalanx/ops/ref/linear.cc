#include <cmath>

#include "phalanx/ops/packing.h"
#include "phalanx/ops/ref/element.h"
#include "phalanx/ops/ref/ref.h"

namespace phalanx::ops::ref {
namespace {

// One output: one accumulator, k ascending (amx: by tiles).
float product(const MatrixView& x, int64_t t, const PackedLinear& w, int64_t row,
              NumericClass numeric_class) {
  const std::byte* panel = w.data + row / tensor::kPanelRows * panel_bytes(w.k, w.dtype);
  const int64_t r = row % tensor::kPanelRows;
  const std::byte* input = x.row<const std::byte>(0) +
                           t * x.stride * static_cast<int64_t>(tensor::dtype_bytes(x.dtype));
  auto weight = [&](int64_t k) { return load(panel, w.dtype, panel_index(r, k, w.dtype)); };
  auto value = [&](int64_t k) { return k < w.k ? load(input, x.dtype, k) : 0.0f; };
  float acc = 0;
  if (numeric_class == NumericClass::kAmx && w.dtype == DType::kBF16) {
    for (int64_t k = 0; k < w.k; k += 32) {  // the last tile is filled up with zeros
      float weights[32] = {};
      float values[32] = {};
      for (int64_t i = 0; i < 32 && k + i < w.k; ++i) {
        weights[i] = weight(k + i);
        values[i] = value(k + i);
      }
      acc = dot_tile(acc, weights, values);
    }
  } else if (numeric_class == NumericClass::kBf16Dp && w.dtype == DType::kBF16) {
    for (int64_t k = 0; k < w.k; k += 2)
      acc = dot_pair(acc, weight(k), weight(k + 1), value(k), value(k + 1));
  } else {
    for (int64_t k = 0; k < w.k; ++k) acc = std::fma(weight(k), value(k), acc);
  }
  return acc;
}

}  // namespace

void linear(const MatrixView& x, const PackedLinear& w, const float* bias, const MatrixView& out,
            NumericClass numeric_class) {
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t n = 0; n < w.rows; ++n) {
      float y = product(x, t, w, n, numeric_class);
      if (bias != nullptr) y += bias[n];
      store(out.data, out.dtype, t * out.stride + n, y);
    }
  }
}

void gated_linear(const MatrixView& x, const PackedGated& w, const float* gate_bias,
                  const float* up_bias, const MatrixView& out, NumericClass numeric_class) {
  constexpr int64_t kRows = tensor::kPanelRows;
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t n = 0; n < w.rows; ++n) {
      const int64_t gate_row = n / kRows * 2 * kRows + n % kRows;
      float gate = product(x, t, w.panels, gate_row, numeric_class);
      float up = product(x, t, w.panels, gate_row + kRows, numeric_class);
      if (gate_bias != nullptr) gate += gate_bias[n];
      if (up_bias != nullptr) up += up_bias[n];
      store(out.data, out.dtype, t * out.stride + n, silu(gate) * up);
    }
  }
}

}  // namespace phalanx::ops::ref
