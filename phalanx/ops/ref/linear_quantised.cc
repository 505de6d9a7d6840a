#include <cmath>
#include <tuple>
#include <vector>

#include "phalanx/ops/packing.h"
#include "phalanx/ops/quantised.h"
#include "phalanx/ops/ref/element.h"
#include "phalanx/ops/ref/ref.h"

namespace phalanx::ops::ref {
namespace {

using quant::Storage;
constexpr int64_t kRows = tensor::kPanelRows;

std::vector<float> values_of(const MatrixView& x, int64_t t, const PackedLinear& w) {
  std::vector<float> values(static_cast<size_t>(w.k));
  for (int64_t k = 0; k < w.k; ++k)
    values[static_cast<size_t>(k)] =
        load(static_cast<const std::byte*>(x.data), x.dtype,
             t * x.stride + (w.order != nullptr ? w.order[k] : k));
  return values;
}

struct Quantised {
  std::vector<int32_t> x;
  int64_t sum = 0;
  float scale = 1;
};

Quantised quantise(const std::vector<float>& values, const float* input) {
  Quantised q;
  float largest = 0;
  float bad = 0;  // NaN as soon as one value is not finite
  for (const float v : values) {
    if (std::fabs(v) > largest) largest = std::fabs(v);
    bad = std::fma(v, 0.0f, bad);
  }
  float divisor = 1;
  float offset = 0;
  if (input != nullptr) {
    divisor = input[0];
    offset = input[1];
  } else {
    q.scale = largest / 127.0f;
    if (q.scale > 0) divisor = q.scale;
  }
  q.scale += std::fabs(bad);
  for (const float v : values) {
    float rounded = std::nearbyint(v / divisor) + offset;
    if (!(rounded <= 127.0f)) rounded = 127.0f;
    if (rounded < -128.0f) rounded = -128.0f;
    q.x.push_back(static_cast<int32_t>(rounded));
    q.sum += q.x.back();
  }
  return q;
}

float int8_product(const Quantised& x, const PackedLinear& w, int64_t row) {
  const PackedGroup g = packed_group(w, row / kRows, 0);
  const int64_t r = row % kRows;
  int32_t sum = 0;
  for (int64_t k = 0; k < w.k; ++k)
    sum += x.x[static_cast<size_t>(k)] *
           static_cast<int8_t>(packed_code(w.storage, g.codes, r, k));
  auto y = static_cast<float>(sum + g.add[r]);
  y = std::fma(-g.zero[r], static_cast<float>(x.sum), y);
  return y * x.scale * g.scale[r];
}

float sum_of(const float* x, int64_t count) {
  float lanes[16] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % 16] += x[i];
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

float code_product(const std::vector<float>& x, const PackedLinear& w, int64_t row, bool pairs) {
  const int64_t r = row % kRows;
  const int64_t groups = (w.k + w.group - 1) / w.group;
  float y = 0;
  for (int64_t i = 0; i < groups; ++i) {
    const PackedGroup g = packed_group(w, row / kRows, i);
    const float* in = x.data() + g.k_begin;
    const int64_t count = g.k_end - g.k_begin;
    auto weight = [&](int64_t k) {
      return k < count ? quant::value_of(w.storage, packed_code(w.storage, g.codes, r, k)) : 0.0f;
    };
    float sum = 0;
    if (pairs) {
      for (int64_t k = 0; k < count; k += 2)
        sum = dot_pair(sum, weight(k), weight(k + 1), in[k], k + 1 < count ? in[k + 1] : 0.0f);
    } else {
      for (int64_t k = 0; k < count; ++k) sum = std::fma(weight(k), in[k], sum);
    }
    if (w.zeros) sum = std::fma(-g.zero[r], sum_of(in, count), sum);
    y = std::fma(g.scale[r], sum, y);
  }
  return y;
}

// product(row): one output of token t.
template <typename Use>
void for_each_token(const MatrixView& x, const PackedLinear& w, NumericClass numeric_class,
                    Use use) {
  const bool pairs = sums_pairs(numeric_class) && x.dtype == DType::kBF16;
  for (int64_t t = 0; t < x.rows; ++t) {
    const std::vector<float> values = values_of(x, t, w);
    if (w.storage == Storage::kInt8) {
      const Quantised q = quantise(values, w.input);
      use(t, [&](int64_t row) { return int8_product(q, w, row); });
    } else {
      use(t, [&](int64_t row) { return code_product(values, w, row, pairs); });
    }
  }
}

}  // namespace

void linear_quantised(const MatrixView& x, const PackedLinear& w, const float* bias,
                      const MatrixView& out, NumericClass numeric_class) {
  for_each_token(x, w, numeric_class, [&](int64_t t, auto product) {
    for (int64_t n = 0; n < w.rows; ++n) {
      float y = product(n);
      if (bias != nullptr) y += bias[n];
      store(out.data, out.dtype, t * out.stride + n, y);
    }
  });
}

void gated_quantised(const MatrixView& x, const PackedGated& w, const float* gate_bias,
                     const float* up_bias, const MatrixView& out, NumericClass numeric_class) {
  if (!w.halves.empty()) {
    std::vector<float> sums(static_cast<size_t>(2 * x.rows * w.rows));
    const MatrixView gate{sums.data(), DType::kF32, x.rows, w.rows, 2 * w.rows};
    const MatrixView up{sums.data() + w.rows, DType::kF32, x.rows, w.rows, 2 * w.rows};
    for (const auto& [half, bias, to] : {std::tuple(&w.halves[0], gate_bias, gate),
                                         std::tuple(&w.halves[1], up_bias, up)})
      if (half->storage == Storage::kFloat)
        linear(x, *half, bias, to, numeric_class);
      else
        linear_quantised(x, *half, bias, to, numeric_class);
    for (int64_t t = 0; t < x.rows; ++t)
      for (int64_t n = 0; n < w.rows; ++n)
        store(out.data, out.dtype, t * out.stride + n,
              silu(gate.row<float>(t)[n]) * up.row<float>(t)[n]);
    return;
  }
  for_each_token(x, w.panels, numeric_class, [&](int64_t t, auto product) {
    for (int64_t n = 0; n < w.rows; ++n) {
      const int64_t gate_row = n / kRows * 2 * kRows + n % kRows;
      float gate = product(gate_row);
      float up = product(gate_row + kRows);
      if (gate_bias != nullptr) gate += gate_bias[n];
      if (up_bias != nullptr) up += up_bias[n];
      store(out.data, out.dtype, t * out.stride + n, silu(gate) * up);
    }
  });
}

}  // namespace phalanx::ops::ref
