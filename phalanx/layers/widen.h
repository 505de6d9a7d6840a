#pragma once

#include <cstddef>
#include <cstdint>

#include "phalanx/tensor/dtype.h"

namespace phalanx::layers {

// out[i] = in[i], exactly. in: f32, f16 or bf16, any alignment.
void widen(const std::byte* in, tensor::DType dtype, int64_t count, float* out);
// out[i] = in[i], rounded to dtype (f32, f16 or bf16), any alignment.
void narrow(const float* in, int64_t count, tensor::DType dtype, std::byte* out);

}  // namespace phalanx::layers
