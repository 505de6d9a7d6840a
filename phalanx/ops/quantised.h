#pragma once

// Packed quantised weights: what ops::linear and ops::gated_linear do with a PackedLinear whose
// storage is not kFloat.
//
// A panel has 16 rows and all of k: for each group of k its codes, then f32 scale[16], then (where
// PackedLinear::zeros) f32 zero[16]. kInt8 has one group and always zeros, and i32 add[16] after
// them. Places of the codes within a group, k padded to whole blocks:
//   kInt8                [k / 4][16][4], as two's complement with the sign bit turned over
//   kCodes8, kCodesFp8   [k / 4][row / 4][(k % 4) / 2][row % 4][k % 2]
//   kCodes4              [k / 8][row][k % 2] 16-bit words, of four codes k % 8 / 2, low bits first
//
// One order, for every number of tokens, threads and ranks:
//   kInt8    y = float(sum x_q * q + add), fma(-zero, float(sum x_q), y), y * s_x, y * scale.
//            x_q = rint(x / s_x), s_x = max|x| / 127 per token; or rint(x / scale) + offset, s_x = 1;
//            limited to -128 ... 127. The sum is exact.
//   codes    per group: the sum over k of value * x in the order of a float weight of x's dtype
//            (pairs for bf16dp), from zero; fma(-zero, sum of x, it) where zeros are stored;
//            y = fma(scale, it, y). Sum of x: 16 lanes, lane tree 8-4-2-1.
// Then own_bias, then the bias, then rounding. A token with NaN or infinity gives NaN.

#include <cstddef>
#include <cstdint>

#include "phalanx/ops/ops.h"

namespace phalanx::ops {

// kInt8: largest k whose sum cannot overflow (255 * 128 * k < 2^31).
inline constexpr int64_t kMaxInt8K = 65'000;

// Bytes of one panel, a multiple of 64.
[[nodiscard]] int64_t quantised_panel_bytes(quant::Storage storage, int64_t k, int64_t group,
                                            bool zeros);
[[nodiscard]] int64_t packed_bytes(const PackedLinear& w);
// Packs source into rows [row_begin, row_begin + source.rows) of w, which has `rows` rows. Panel p
// becomes panel p * step + offset (step 2 for gate and up). row_begin and all but the last
// source.rows are multiples of 16.
void pack_quantised(const quant::Rows& source, int64_t row_begin, int64_t rows,
                    const PackedLinear& w, int64_t step, int64_t offset, std::byte* packed);

// A group of a packed panel: where its codes and parameters lie.
struct PackedGroup {
  const std::byte* codes = nullptr;
  const float* scale = nullptr;  // [16]
  const float* zero = nullptr;   // [16], or nullptr
  const int32_t* add = nullptr;  // kInt8: [16]
  int64_t k_begin = 0;
  int64_t k_end = 0;
};
[[nodiscard]] PackedGroup packed_group(const PackedLinear& w, int64_t panel, int64_t group);
[[nodiscard]] uint8_t packed_code(quant::Storage storage, const std::byte* codes, int64_t row,
                                  int64_t k);  // kInt8: two's complement

// Bytes of codes for k columns of a group.
[[nodiscard]] constexpr int64_t code_bytes(quant::Storage storage, int64_t k) {
  return storage == quant::Storage::kCodes4 ? (k + 7) / 8 * 64 : (k + 3) / 4 * 64;
}

}  // namespace phalanx::ops
