#include <immintrin.h>

#include "phalanx/ops/cpu/kernels.h"

namespace {

// V over AVX2, FMA and F16C: lanes 0 to 7 and 8 to 15. See kernels.inl.
struct V {
  __m256 lo;
  __m256 hi;
};

constexpr int kPeakChains = 6;
constexpr int kTilePanels(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
constexpr int kStreamPanels(int rows) { return kTilePanels(rows); }

inline V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256i first_lanes(int64_t n) {
  const int count = n < 0 ? 0 : n > 8 ? 8 : static_cast<int>(n);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline V load_n(const float* p, int64_t n) {
  return {_mm256_maskload_ps(p, first_lanes(n)),
          n > 8 ? _mm256_maskload_ps(p + 8, first_lanes(n - 8)) : _mm256_setzero_ps()};
}
inline __m256 widen(const void* p) {
  const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline V load_bf16(const uint16_t* p) { return {widen(p), widen(p + 8)}; }
inline V load_bf16_n(const uint16_t* p, int64_t n) {
  uint16_t whole[16] = {};
  __builtin_memcpy(whole, p, static_cast<size_t>(n) * 2);
  return load_bf16(whole);
}
inline V load_f16(const std::byte* p) {
  const auto* v = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(v)), _mm256_cvtph_ps(_mm_loadu_si128(v + 1))};
}
inline __m256i load_int(const std::byte* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline V even_bf16(const std::byte* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(load_int(p), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(load_int(p + 32), 16))};
}
inline V odd_bf16(const std::byte* p) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(load_int(p), high)),
          _mm256_castsi256_ps(_mm256_and_si256(load_int(p + 32), high))};
}
inline void store(float* p, V v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
inline void store_n(float* p, int64_t n, V v) {
  _mm256_maskstore_ps(p, first_lanes(n), v.lo);
  if (n > 8) _mm256_maskstore_ps(p + 8, first_lanes(n - 8), v.hi);
}
// Round to nearest even; NaN stays NaN (tensor::f32_to_bf16). Results in the low halves.
inline __m256i round_bf16(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r =
      _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(r, quiet, nan);
}
inline void store_bf16(uint16_t* p, V v) {
  const __m256i mixed = _mm256_packus_epi32(round_bf16(v.lo), round_bf16(v.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0xd8));
}
inline void store_bf16_n(uint16_t* p, int64_t n, V v) {
  uint16_t whole[16];
  store_bf16(whole, v);
  __builtin_memcpy(p, whole, static_cast<size_t>(n) * 2);
}
inline V add(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline V sub(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline V mul(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline V div(V a, V b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline V fma(V a, V b, V c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline V max(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline V negate(V a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(a.lo, sign), _mm256_xor_ps(a.hi, sign)};
}
inline __m256 scale_of(__m256 shifted) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23),
                                              _mm256_set1_epi32(0x3f800000)));
}
inline V times_two_to(V p, V, V shifted, V x, V limit) {
  return {_mm256_and_ps(_mm256_mul_ps(p.lo, scale_of(shifted.lo)),
                        _mm256_cmp_ps(x.lo, limit.lo, _CMP_NLT_UQ)),
          _mm256_and_ps(_mm256_mul_ps(p.hi, scale_of(shifted.hi)),
                        _mm256_cmp_ps(x.hi, limit.hi, _CMP_NLT_UQ))};
}
inline V above(V x, V limit, V yes, V no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(x.lo, limit.lo, _CMP_GT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(x.hi, limit.hi, _CMP_GT_OQ))};
}
// Lanes begin <= i < end of v, `other` elsewhere.
inline V keep(V v, int64_t begin, int64_t end, float other) {
  float lanes[16];
  store(lanes, v);
  for (int64_t i = 0; i < 16; ++i)
    if (i < begin || i >= end) lanes[i] = other;
  return load(lanes);
}
// Lane trees 8-4-2-1.
inline float sum(V x) {
  const __m256 eight = _mm256_add_ps(x.lo, x.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(V x) {
  const __m256 eight = _mm256_max_ps(x.lo, x.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline float square_root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

inline __attribute__((always_inline)) void keep_alive(V& v) {
  __asm__ volatile("" : "+x"(v.lo), "+x"(v.hi));
}

inline __m256 i8_to_ps(__m128i eight) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)); }
inline __m256 words_to_ps(__m128i eight) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(eight));
}
inline V even_i8(const std::byte* p) {
  const __m256i words = load_int(p);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(words, 8), 8);
  return {words_to_ps(_mm256_castsi256_si128(even)),
          words_to_ps(_mm256_extracti128_si256(even, 1))};
}
inline V odd_i8(const std::byte* p) {
  const __m256i odd = _mm256_srai_epi16(load_int(p), 8);
  return {words_to_ps(_mm256_castsi256_si128(odd)), words_to_ps(_mm256_extracti128_si256(odd, 1))};
}
inline V load_i8(const int8_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {i8_to_ps(v), i8_to_ps(_mm_srli_si128(v, 8))};
}
inline __m256i to_clamped_int(__m256 x) {
  __m256 v = _mm256_and_ps(x, _mm256_cmp_ps(x, x, _CMP_ORD_Q));
  v = _mm256_min_ps(_mm256_max_ps(v, _mm256_set1_ps(-128.0f)), _mm256_set1_ps(127.0f));
  return _mm256_cvtps_epi32(v);
}
inline void store_i8_n(int8_t* p, int64_t n, V x) {
  alignas(32) int32_t whole[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(whole), to_clamped_int(x.lo));
  _mm256_store_si256(reinterpret_cast<__m256i*>(whole + 8), to_clamped_int(x.hi));
  for (int64_t i = 0; i < 16 && i < n; ++i) p[i] = static_cast<int8_t>(whole[i]);
}
inline V magnitude(V x) {
  const __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.lo, all), _mm256_and_ps(x.hi, all)};
}

#include "phalanx/ops/cpu/kernels.inl"

}  // namespace

const phalanx::ops::cpu::Kernels& phalanx::ops::cpu::avx2_kernels() {
  static constinit Kernels kernels = make_kernels();
  return kernels;
}
