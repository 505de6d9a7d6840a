#pragma once

// What a kernel path offers for quantised weights (quantised.h), beside its float kernels. As
// kernels.h: plain loops over memory, no threads, no checks, no inline functions of others.

#include <cstddef>
#include <cstdint>

namespace phalanx::ops::cpu {

// Least k per scale.
inline constexpr int64_t kLeastGroup = 8;
// Token rows that a streaming product takes at once.
inline constexpr int64_t kStreamRows = 4;

enum class Codes : uint8_t { k4, k8, kFp8 };

// c[m][16 * p + i] = (accumulate ? c : 0) + sum over k of w[p][k][i] * x[m][k], w a kInt8 panel
// (sign bits turned over). Exact.
struct Int8Product {
  const int8_t* x = nullptr;  // rows padded with zeros to a multiple of 64
  int64_t x_stride = 0;
  int64_t rows = 0;
  const int32_t* x_sum = nullptr;  // [rows], of all of k
  const std::byte* w = nullptr;
  int64_t panel_stride = 0;  // bytes
  int64_t panels = 0;        // as in Product
  int64_t k = 0;             // a multiple of 4
  int32_t* c = nullptr;      // 64-byte aligned rows
  int64_t c_stride = 0;
  bool accumulate = false;
  const std::byte* next = nullptr;  // what will be read next, laid out as w; nullptr if unknown
};

// c[m][16 * p + i]: whole outputs of code panels for few tokens, in one pass over the codes.
struct CodesProduct {
  Codes codes = Codes::k8;
  const uint16_t* x = nullptr;  // bf16, rows padded with zeros to a multiple of 8
  int64_t x_stride = 0;
  int64_t rows = 0;             // 1 ... kStreamRows
  const float* x_sums = nullptr;  // [rows][groups], or nullptr: no zero points
  int64_t x_sums_stride = 0;
  const std::byte* w = nullptr;
  int64_t panel_stride = 0;
  int64_t panels = 0;           // as in Product
  int64_t k = 0;
  int64_t group = 0;
  float* c = nullptr;
  int64_t c_stride = 0;
  const std::byte* next = nullptr;  // what will be read next, laid out as w
};

struct IntegerKernels {
  void (*multiply_int8)(const Int8Product&) = nullptr;
  // One row of k elements: out padded with zeros to a multiple of 64. order, input: of PackedLinear.
  void (*quantise)(const void* x, bool x_bf16, const float* input, int64_t k, int8_t* out,
                   float* scale, int32_t* sum) = nullptr;
  // c: int32 in, f32 out. panel: of the parameters of the first panel.
  void (*finish_int8)(float* c, int64_t c_stride, int64_t rows, int64_t panels,
                      const std::byte* parameters, int64_t panel_stride, const float* token_scale,
                      const int32_t* token_sum) = nullptr;

  // k columns of one panel's codes to bf16 pairs [k / 2][16][2], or f16 [k][16].
  void (*expand)(Codes codes, const std::byte* in, int64_t k, bool pairs, std::byte* out) = nullptr;
  // Sums of each group of a row.
  void (*sum_groups)(const void* x, bool x_bf16, int64_t k, int64_t group, float* out) = nullptr;
  // total = fma(scale, fma(-zero, x_sum, part), first ? 0 : total). x_sums [rows], x_sums_stride
  // apart, or nullptr.
  void (*apply)(float* total, const float* part, int64_t c_stride, int64_t rows, int64_t panels,
                const std::byte* parameters, int64_t panel_stride, const float* x_sums,
                int64_t x_sums_stride, bool first) = nullptr;

  // For benchmarks: int8 operations done by `steps` steps of independent chains of products.
  int64_t (*peak)(int64_t steps) = nullptr;
  // nullptr where the path has none.
  void (*stream)(const CodesProduct&) = nullptr;
};

const IntegerKernels& avx2_integer_kernels();
const IntegerKernels& avx512_integer_kernels();      // AVX-512 F, BW, VNNI
const IntegerKernels& avx512bf16_integer_kernels();  // and bf16, VBMI

}  // namespace phalanx::ops::cpu
