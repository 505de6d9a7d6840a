#include "phalanx/layers/widen.h"

#include <cstring>

#include "phalanx/base/check.h"

namespace phalanx::layers {
namespace {

template <typename Convert>
void widen_halves(const std::byte* in, int64_t count, float* out, Convert convert) {
  for (int64_t i = 0; i < count; ++i) {
    uint16_t half = 0;
    std::memcpy(&half, in + i * 2, sizeof half);
    out[i] = convert(half);
  }
}

}  // namespace

void widen(const std::byte* in, tensor::DType dtype, int64_t count, float* out) {
  switch (dtype) {
    case tensor::DType::kF32:
      if (count > 0) std::memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
      return;
    case tensor::DType::kBF16:
      return widen_halves(in, count, out, [](uint16_t v) { return tensor::bf16_to_f32(v); });
    case tensor::DType::kF16:
      return widen_halves(in, count, out, [](uint16_t v) { return tensor::f16_to_f32(v); });
    default:
      PHALANX_CHECK(!"a float dtype");
  }
}

void narrow(const float* in, int64_t count, tensor::DType dtype, std::byte* out) {
  if (dtype == tensor::DType::kF32) {
    if (count > 0) std::memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  PHALANX_CHECK(dtype == tensor::DType::kBF16 || dtype == tensor::DType::kF16);
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t half = dtype == tensor::DType::kBF16 ? tensor::f32_to_bf16(in[i])
                                                        : tensor::f32_to_f16(in[i]);
    std::memcpy(out + i * 2, &half, sizeof half);
  }
}

}  // namespace phalanx::layers
