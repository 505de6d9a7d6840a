#pragma once

// What a kernel path offers to the drivers of ops/cpu: plain loops over memory, no threads, no
// checks. The paths compile kernels.inl with their own instruction sets, each in its own
// namespace; this header and kernels.inl therefore include nothing that has inline functions.

#include <cstddef>
#include <cstdint>

namespace phalanx::ops::cpu {

// Panels that the kernels take at once: the unit of work of the drivers.
inline constexpr int64_t kGroupPanels = 4;
// Token rows of the register tile.
inline constexpr int64_t kTileRows = 6;

// c[m][16 * p + i] = (accumulate ? c : 0) + sum over k, ascending, of w[p][k][i] * x[m][k].
struct Product {
  const void* x = nullptr;  // f32, or bf16 for Kernels::multiply_bf16 of the bf16dp class
  int64_t x_stride = 0;     // elements
  int64_t rows = 0;
  const std::byte* w = nullptr;  // first panel at the first k
  int64_t panel_stride = 0;      // bytes
  int64_t panels = 0;            // 1 ... kGroupPanels
  int64_t k = 0;
  float* c = nullptr;  // 64-byte aligned rows
  int64_t c_stride = 0;
  bool accumulate = false;
  const std::byte* next = nullptr;  // what will be read next, laid out as w; nullptr if unknown
};

struct Kernels {
  bool pairs = false;  // multiply_bf16 takes bf16 inputs
  void (*multiply_bf16)(const Product&) = nullptr;
  void (*multiply_f16)(const Product&) = nullptr;
  void (*multiply_f32)(const Product&) = nullptr;

  // out = c + bias, rounded. bias may be nullptr. Strides in elements.
  void (*finish)(const float* c, int64_t c_stride, int64_t rows, int64_t cols, const float* bias,
                 void* out, int64_t out_stride, bool out_bf16) = nullptr;
  // c: pairs of panels (16 gate, 16 up); cols counts outputs.
  void (*finish_gated)(const float* c, int64_t c_stride, int64_t rows, int64_t cols,
                       const float* gate_bias, const float* up_bias, void* out, int64_t out_stride,
                       bool out_bf16) = nullptr;

  // n elements, any of bf16 and f32 to any.
  void (*convert)(const void* in, bool in_bf16, int64_t n, void* out, bool out_bf16) = nullptr;
  void (*add)(float* residual, const void* delta, bool delta_bf16, int64_t n) = nullptr;
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, void* out,
                   bool out_bf16) = nullptr;
  // One head: in may equal out if the types are equal.
  void (*rope)(const void* in, bool in_bf16, const float* cos, const float* sin, int64_t half,
               int64_t head_dim, void* out, bool out_bf16) = nullptr;

  // 16 key rows (nullptr: zeros) into a panel: f32 [k][16], or bf16 pairs [k / 2][16][2].
  void (*pack_keys)(const std::byte* const* rows, bool in_bf16, int64_t k, void* panel,
                    bool panel_bf16) = nullptr;
  // `count` value rows into f32 panels [head_dim / 16][..][16], `panel_stride` floats apart.
  void (*pack_values)(const std::byte* const* rows, bool in_bf16, int64_t count, int64_t head_dim,
                      float* out, int64_t panel_stride) = nullptr;
  // Asks for `bytes` of each row.
  void (*prefetch_rows)(const std::byte* const* rows, int64_t count, int64_t bytes) = nullptr;
  // s[j] = exp(s[j] * scale - max) for begin <= j < end.
  void (*softmax)(float* s, int64_t begin, int64_t end, float scale, float* max,
                  float* sum) = nullptr;
  // (max, sum, o) merged with those of the next chunk. n a multiple of 16.
  void (*merge)(float* max, float* sum, float* o, float chunk_max, float chunk_sum,
                const float* chunk_o, int64_t n) = nullptr;
  // out = o / sum.
  void (*divide)(const float* o, float sum, int64_t n, void* out, bool out_bf16) = nullptr;

  // For benchmarks: what the core can do at best. Floating-point operations done by `steps` steps
  // of independent chains of products (pairs: by vdpbf16ps; else f32).
  int64_t (*peak)(int64_t steps, bool pairs) = nullptr;
  // Reads memory once, `bytes` a multiple of 4096; the result only keeps the reads alive.
  float (*read)(const float* memory, int64_t bytes) = nullptr;
};

const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512bf16_kernels();

}  // namespace phalanx::ops::cpu
