#pragma once

// Float weights to int8 or int4 by rounding to nearest, symmetric: code = round(w / scale), scale =
// max|w| / largest code, per row or per group of k. The scale is rounded to scale_dtype first.

#include <cstdint>
#include <span>
#include <vector>

#include "phalanx/tensor/dtype.h"

namespace phalanx::quant {

struct QuantisedRows {
  std::vector<int8_t> codes;  // [rows][k], two's complement: -128 ... 127, or -8 ... 7
  std::vector<float> scale;   // [rows][groups], values that scale_dtype holds
};

// weights: [rows][k]; group: k per scale, divides k, 0 = all of k; bits: 4 or 8. A row or group of
// zeros has scale 1. All weights must be finite.
[[nodiscard]] QuantisedRows quantise_rows(std::span<const float> weights, int64_t rows, int64_t k,
                                          int bits, int64_t group, tensor::DType scale_dtype);

// Codes as unsigned numbers (plus 128 or 8) in 32-bit words, low bits first, each row padded to whole
// words: the weight_packed of compressed-tensors.
[[nodiscard]] std::vector<uint32_t> pack_words(std::span<const int8_t> codes, int64_t rows,
                                               int64_t k, int bits);

}  // namespace phalanx::quant
