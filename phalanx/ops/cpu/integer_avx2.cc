// Quantised weights on AVX2: int8 widened to 16 bits and multiplied by vpmaddwd, whose sums of two
// cannot overflow (vpmaddubsw would saturate).

#include <immintrin.h>

#include "phalanx/ops/cpu/integer_kernels.h"

namespace {

#include "phalanx/ops/cpu/integer_loops.inl"

// Sums of a panel: rows 4 q ... 4 q + 3 in acc[q], each as two halves of k % 4.
template <int kRows>
void run_tile(const Int8Product& a, int64_t row, int64_t panel) {
  __m256i acc[kRows][4];
  for (auto& m : acc)
    for (__m256i& v : m) v = _mm256_setzero_si256();
  const std::byte* w = a.w + panel * a.panel_stride;
  const int8_t* x = a.x + row * a.x_stride;
  for (int64_t k = 0; k < a.k; k += 4, w += 64, x += 4) {
    __m256i v[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q)
      v[q] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16 * q)));
#pragma GCC unroll 2
    for (int m = 0; m < kRows; ++m) {
      int32_t four = 0;
      __builtin_memcpy(&four, x + m * a.x_stride, 4);
      const __m256i value = _mm256_cvtepi8_epi16(_mm_set1_epi32(four));
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q)
        acc[m][q] = _mm256_add_epi32(acc[m][q], _mm256_madd_epi16(v[q], value));
    }
  }
  for (int m = 0; m < kRows; ++m) {
    int32_t* c = a.c + (row + m) * a.c_stride + 16 * panel;
    for (int q = 0; q < 4; ++q) {
      // Pairs of lanes of one row: hadd within 128 bits, then the two halves side by side.
      const __m256i sums = _mm256_hadd_epi32(acc[m][q], acc[m][q]);
      __m128i four = _mm_unpacklo_epi64(_mm256_castsi256_si128(sums),
                                        _mm256_extracti128_si256(sums, 1));
      auto* to = reinterpret_cast<__m128i*>(c + 4 * q);
      // Codes are 128 too large.
      four = _mm_add_epi32(four, a.accumulate ? _mm_loadu_si128(to)
                                              : _mm_set1_epi32(-128 * a.x_sum[row + m]));
      _mm_storeu_si128(to, four);
    }
  }
}

void multiply_int8(const Int8Product& a) {
  for (int64_t panel = 0; panel < a.panels; ++panel) {
    int64_t row = 0;
    for (; row + 2 <= a.rows; row += 2) run_tile<2>(a, row, panel);
    if (row < a.rows) run_tile<1>(a, row, panel);
  }
}

int64_t peak(int64_t steps) {
  constexpr int kChains = 8;
  __m256i acc[kChains];
  for (__m256i& v : acc) v = _mm256_setzero_si256();
  __m256i w = _mm256_set1_epi16(3);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) {
      __asm__ volatile("" : "+x"(w));  // or one product would serve all chains
      acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(w, w));
    }
  }
  for (__m256i& v : acc) __asm__ volatile("" : "+x"(v));
  return steps * kChains * 32;
}

}  // namespace

const phalanx::ops::cpu::IntegerKernels& phalanx::ops::cpu::avx2_integer_kernels() {
  static constexpr IntegerKernels kernels{.multiply_int8 = multiply_int8,
                                          .quantise = quantise,
                                          .finish_int8 = finish_int8,
                                          .expand = expand,
                                          .sum_groups = sum_groups,
                                          .apply = apply,
                                          .peak = peak};
  return kernels;
}
