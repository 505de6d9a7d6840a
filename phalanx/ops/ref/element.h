#pragma once

#include <bit>
#include <cstdint>

#include "phalanx/tensor/dtype.h"

namespace phalanx::ops::ref {

// Element i of memory of a float dtype or of int8, widened.
[[nodiscard]] inline float load(const void* data, tensor::DType dtype, int64_t i) {
  switch (dtype) {
    case tensor::DType::kBF16:
      return tensor::bf16_to_f32(static_cast<const uint16_t*>(data)[i]);
    case tensor::DType::kI8:
      return static_cast<const int8_t*>(data)[i];
    case tensor::DType::kF16:
      return tensor::f16_to_f32(static_cast<const uint16_t*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

// Rounds to bf16 or f32 and stores as element i.
inline void store(void* data, tensor::DType dtype, int64_t i, float value) {
  if (dtype == tensor::DType::kBF16)
    static_cast<uint16_t*>(data)[i] = tensor::f32_to_bf16(value);
  else
    static_cast<float*>(data)[i] = value;
}

}  // namespace phalanx::ops::ref
