#include <immintrin.h>

#include "phalanx/ops/cpu/kernels.h"

#define PHALANX_PAIRS 1

namespace {
#include "phalanx/ops/cpu/vector_avx512.inl"

// bf16 weights times bf16 inputs, two k at a time, by vdpbf16ps.
struct WeightsPairs {
  using X = uint16_t;
  static constexpr int kStep = 2;
  static constexpr int64_t kBytes = 64;
  static inline __attribute__((always_inline)) __m512bh load(const std::byte* p) {
    return (__m512bh)_mm512_loadu_si512(p);
  }
};
// int8 is widened exactly.
struct WeightsPairsI8 {
  using X = uint16_t;
  static constexpr int kStep = 2;
  static constexpr int64_t kBytes = 32;
  static inline __attribute__((always_inline)) __m512bh load(const std::byte* p) {
    const auto* v = reinterpret_cast<const __m128i*>(p);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(v)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(v + 1)));
    return _mm512_cvtne2ps_pbh(high, low);
  }
};

#include "phalanx/ops/cpu/kernels.inl"
}  // namespace

const phalanx::ops::cpu::Kernels& phalanx::ops::cpu::avx512bf16_kernels() {
  static constinit Kernels kernels = make_kernels();
  return kernels;
}
