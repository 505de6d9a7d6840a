#include "phalanx/quant/quantise.h"

#include <algorithm>
#include <cmath>

#include "phalanx/base/check.h"

namespace phalanx::quant {
namespace {

using tensor::DType;

float rounded(float v, DType dtype) {
  if (dtype == DType::kBF16) return tensor::bf16_to_f32(tensor::f32_to_bf16(v));
  if (dtype == DType::kF16) return tensor::f16_to_f32(tensor::f32_to_f16(v));
  return v;
}

}  // namespace

QuantisedRows quantise_rows(std::span<const float> weights, int64_t rows, int64_t k, int bits,
                            int64_t group, DType scale_dtype) {
  PHALANX_CHECK((bits == 4 || bits == 8) && static_cast<int64_t>(weights.size()) == rows * k);
  if (group == 0) group = k;
  PHALANX_CHECK(k > 0 && k % group == 0);
  const auto most = static_cast<float>((1 << (bits - 1)) - 1);
  QuantisedRows out;
  out.codes.resize(weights.size());
  out.scale.reserve(static_cast<size_t>(rows * (k / group)));
  for (int64_t begin = 0; begin < rows * k; begin += group) {
    const float* w = weights.data() + begin;
    float largest = 0;
    for (int64_t i = 0; i < group; ++i) largest = std::max(largest, std::fabs(w[i]));
    float scale = rounded(largest / most, scale_dtype);
    if (scale == 0) scale = 1;
    out.scale.push_back(scale);
    for (int64_t i = 0; i < group; ++i)
      out.codes[static_cast<size_t>(begin + i)] =
          static_cast<int8_t>(std::clamp(std::nearbyint(w[i] / scale), -most - 1, most));
  }
  return out;
}

std::vector<uint32_t> pack_words(std::span<const int8_t> codes, int64_t rows, int64_t k, int bits) {
  const int64_t per_word = 32 / bits;
  const int64_t words = (k + per_word - 1) / per_word;
  const int offset = 1 << (bits - 1);
  std::vector<uint32_t> out(static_cast<size_t>(rows * words));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < k; ++i)
      out[static_cast<size_t>(r * words + i / per_word)] |=
          static_cast<uint32_t>(codes[static_cast<size_t>(r * k + i)] + offset)
          << (bits * (i % per_word));
  return out;
}

}  // namespace phalanx::quant
