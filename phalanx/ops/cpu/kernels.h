#pragma once

// What a kernel path offers to the drivers of ops/cpu: plain loops over memory, no threads, no
// checks. The paths compile kernels.inl with their own instruction sets, each in its own
// namespace; this header and kernels.inl therefore include nothing that has inline functions.

#include <cstddef>
#include <cstdint>

namespace phalanx::ops::cpu {

// Panels that the kernels take at once: the unit of work of the drivers.
inline constexpr int64_t kGroupPanels = 4;
// For that few token rows, which wait for memory, they take more: more streams from it at once.
inline constexpr int64_t kWidePanels = 8;
inline constexpr int64_t kWideRows = 2;
// Token rows of the register tile.
inline constexpr int64_t kTileRows = 6;

// c[m][16 * p + i] = (accumulate ? c : 0) + sum over k, ascending, of w[p][k][i] * x[m][k].
struct Product {
  const void* x = nullptr;  // f32, or bf16 for Kernels::multiply_bf16 of the bf16dp class
  int64_t x_stride = 0;     // elements
  int64_t rows = 0;
  const std::byte* w = nullptr;  // first panel at the first k
  int64_t panel_stride = 0;      // bytes
  int64_t panels = 0;            // 1 ... kGroupPanels, or kWidePanels where rows <= kWideRows
  int64_t k = 0;
  float* c = nullptr;  // 64-byte aligned rows
  int64_t c_stride = 0;
  bool accumulate = false;
  const std::byte* next = nullptr;  // what will be read next, laid out as w; nullptr if unknown
};

// The KV cache as the products of attention read it: units of 16 positions of one head, laid out as
// in kv_layout.h (keys: a panel; values: 8 rows of pairs, or 16 rows of f32).
enum class KvType { kF32, kBF16, kI8 };

// s[m][16 * u + i] = sum over k, ascending, of unit u [k][i] * q[m][k].
struct Scores {
  KvType type = KvType::kBF16;
  bool pairs = false;       // by pairs, with bf16 q: Kernels::pairs, and keys that are not f32
  const void* q = nullptr;  // else f32
  int64_t q_stride = 0;     // elements
  int64_t rows = 0;
  const std::byte* const* units = nullptr;
  const std::byte* const* next =
      nullptr;        // one for each unit: what to ask for meanwhile; or nullptr
  int64_t count = 0;  // units
  int64_t k = 0;      // head_dim
  float* s = nullptr;
  int64_t s_stride = 0;
};

// o[m][i] = sum over the positions begin[m] <= j < end[m], ascending, of p[m][j] * value[j][i]. No
// other value is touched. Rows with begin == end give anything.
struct Values {
  KvType type = KvType::kBF16;
  bool pairs = false;
  const void* p = nullptr;  // as q; zeros between begin and end of a row and the pairs' bounds
  int64_t p_stride = 0;
  int64_t rows = 0;
  const int32_t* begin = nullptr;
  const int32_t* end = nullptr;
  const std::byte* const* units = nullptr;  // of positions 0 ... 15, 16 ... 31, ...
  const std::byte* const* next = nullptr;   // as in Scores
  int64_t panels = 0;                       // head_dim / 16, rounded up
  float* o = nullptr;
  int64_t o_stride = 0;
};

struct Kernels {
  bool pairs = false;   // multiply_bf16 takes bf16 inputs
  bool narrow = false;  // tall register tiles are less than kGroupPanels wide
  void (*multiply_bf16)(const Product&) = nullptr;
  void (*multiply_f16)(const Product&) = nullptr;
  void (*multiply_f32)(const Product&) = nullptr;

  // One panel of bf16 pairs, or of f16, of an even number k of inputs as f32 [k][16], exact.
  void (*widen_bf16)(const std::byte* panel, int64_t k, float* out) = nullptr;
  void (*widen_f16)(const std::byte* panel, int64_t k, float* out) = nullptr;

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
  // bias: or nullptr.
  void (*rms_norm)(const float* x, const float* weight, float eps, const float* bias, int64_t n,
                   void* out, bool out_bf16) = nullptr;
  // One head: in may equal out if the types are equal.
  void (*rope)(const void* in, bool in_bf16, const float* cos, const float* sin, int64_t half,
               int64_t head_dim, void* out, bool out_bf16) = nullptr;

  // The products of attention.
  void (*scores)(const Scores&) = nullptr;
  void (*values)(const Values&) = nullptr;
  // max = scale * (largest s[j] * key_scale[j]), scale > 0;
  // p[j] = exp(fma(s[j] * key_scale[j], scale, -max)) * value_scale[j] for begin <= j < end, and
  // zeros in the rest of the first and the last 16; sum is that of the exponentials. s is 64-byte
  // aligned; p may lie over it. Scales of positions may be nullptr.
  void (*softmax)(const float* s, int64_t begin, int64_t end, float scale, const float* key_scale,
                  const float* value_scale, void* p, bool p_bf16, float* max, float* sum) = nullptr;
  // (max, sum, o) merged with those of the next chunk. n a multiple of 16.
  void (*merge)(float* max, float* sum, float* o, float chunk_max, float chunk_sum,
                const float* chunk_o, int64_t n) = nullptr;
  // out = (o / sum - offset) * scale; offset and scale may be nullptr.
  void (*divide)(const float* o, float sum, const float* offset, const float* scale, int64_t n,
                 void* out, bool out_bf16) = nullptr;
  // out = in * scale.
  void (*scale)(const void* in, bool in_bf16, const float* scale, int64_t n, void* out,
                bool out_bf16) = nullptr;
  // int8 as KvLayer says: with `scale` (and offset or nullptr), or, without, by the row's own,
  // which is returned.
  float (*quantise)(const float* x, const float* scale, const float* offset, int64_t n,
                    int8_t* out) = nullptr;
  // n values to bf16, exact. n a multiple of 16.
  void (*widen_i8)(const int8_t* in, int64_t n, uint16_t* out) = nullptr;

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
