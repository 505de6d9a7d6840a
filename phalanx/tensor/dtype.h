#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace phalanx::tensor {

enum class DType : uint8_t { kF32, kF16, kBF16, kI8, kU8, kI16, kI32, kI64, kF64, kF8E4M3, kBool };

[[nodiscard]] constexpr size_t dtype_bytes(DType t) {
  switch (t) {
    case DType::kF64:
    case DType::kI64: return 8;
    case DType::kF32:
    case DType::kI32: return 4;
    case DType::kF16:
    case DType::kBF16:
    case DType::kI16: return 2;
    default: return 1;
  }
}

[[nodiscard]] std::string_view dtype_name(DType t);  // "f32", "bf16", ...

// bf16 <-> f32, round to nearest even, NaN stays NaN.
[[nodiscard]] inline float bf16_to_f32(uint16_t v) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(v) << 16);
}
[[nodiscard]] inline uint16_t f32_to_bf16(float f) {
  uint32_t u = __builtin_bit_cast(uint32_t, f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
  u += 0x7fffu + ((u >> 16) & 1);
  return static_cast<uint16_t>(u >> 16);
}
// Portable IEEE half -> float (exact).
[[nodiscard]] float f16_to_f32(uint16_t v);
[[nodiscard]] uint16_t f32_to_f16(float f);

}  // namespace phalanx::tensor
