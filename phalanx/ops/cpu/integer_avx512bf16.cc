// Quantised weights on AVX-512 with bf16, VNNI and VBMI: codes become bf16 in registers, by tables,
// on their way to vdpbf16ps.

#include <immintrin.h>

#include "phalanx/ops/cpu/integer_kernels.h"

namespace {

#include "phalanx/ops/cpu/integer_loops.inl"

#include "phalanx/ops/cpu/integer_avx512.inl"

// 8-bit codes: sign bit and 7 bits that choose among 128 values; the two bytes of the value come
// from a table each, and meet by unpacking.
struct Table8 {
  __m512i low[2];
  __m512i high[2];

  explicit Table8(const uint16_t* table) {
    alignas(64) uint8_t bytes[2][128];
    for (int i = 0; i < 128; ++i) {
      bytes[0][i] = static_cast<uint8_t>(table[i]);
      bytes[1][i] = static_cast<uint8_t>(table[i] >> 8);
    }
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(bytes[0] + 64 * i);
      high[i] = _mm512_load_si512(bytes[1] + 64 * i);
    }
  }
  // 64 codes to two vectors of pairs: k % 4 = 0, 1 and k % 4 = 2, 3.
  inline __attribute__((always_inline)) void decode(__m512i codes, __m512i& first,
                                                    __m512i& second) const {
    const __m512i lows = _mm512_permutex2var_epi8(low[0], codes, low[1]);
    __m512i highs = _mm512_permutex2var_epi8(high[0], codes, high[1]);
    // highs | (codes & 0x80)
    highs = _mm512_ternarylogic_epi32(highs, codes, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
    first = _mm512_unpacklo_epi8(lows, highs);
    second = _mm512_unpackhi_epi8(lows, highs);
  }
};

struct Table4 {
  __m512i values;
  explicit Table4(const uint16_t* table) {
    alignas(64) uint16_t twice[32];
    for (int i = 0; i < 32; ++i) twice[i] = table[i % 16];
    values = _mm512_load_si512(twice);
  }
  // Codes in the lowest bits of each word; the index takes five, its fifth chooses a copy.
  [[nodiscard]] inline __attribute__((always_inline)) __m512i decode(__m512i codes) const {
    return _mm512_permutexvar_epi16(codes, values);
  }
  // Four vectors of pairs of 64 bytes of codes. The second byte of a word is loaded, not shifted,
  // into its place; the byte after the 64 is read too (parameters follow).
  inline __attribute__((always_inline)) void decode(const std::byte* codes, __m512i (&v)[4]) const {
    const __m512i low = _mm512_loadu_si512(codes);
    const __m512i high = _mm512_loadu_si512(codes + 1);
    v[0] = decode(low);
    v[1] = decode(_mm512_srli_epi16(low, 4));
    v[2] = decode(high);
    v[3] = decode(_mm512_srli_epi16(high, 4));
  }
};

inline __attribute__((always_inline)) __m512bh pair_of(const uint16_t* x) {
  int32_t two = 0;
  __builtin_memcpy(&two, x, 4);
  return (__m512bh)_mm512_set1_epi32(two);
}

// One group of kPanels panels against kRows rows.
template <int kRows, int kPanels>
struct Tile {
  __m512 acc[kRows][kPanels];

  inline __attribute__((always_inline)) void clear() {
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) acc[m][p] = _mm512_setzero_ps();
  }
  // A pair of panel p.
  inline __attribute__((always_inline)) void product(int p, __m512i v, const uint16_t* x,
                                                     int64_t x_stride) {
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m)
      acc[m][p] = _mm512_dpbf16_ps(acc[m][p], (__m512bh)v, pair_of(x + m * x_stride));
  }
  // 64 bytes of codes of each panel.
  inline __attribute__((always_inline)) void step(const Table8& table, const std::byte* w,
                                                  int64_t stride, const uint16_t* x,
                                                  int64_t x_stride) {
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      __m512i first;
      __m512i second;
      table.decode(_mm512_loadu_si512(w + p * stride), first, second);
      product(p, first, x, x_stride);
      product(p, second, x + 2, x_stride);
    }
  }
  inline __attribute__((always_inline)) void step(const Table4& table, const std::byte* w,
                                                  int64_t stride, const uint16_t* x,
                                                  int64_t x_stride) {
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      __m512i v[4];
      table.decode(w + p * stride, v);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) product(p, v[n], x + 2 * n, x_stride);
    }
  }
};

constexpr int64_t kPerStep(const Table8&) { return 4; }
constexpr int64_t kPerStep(const Table4&) { return 8; }

template <int kRows, int kPanels, typename Table>
__attribute__((noinline)) void stream_tile(const CodesProduct& a, const Table& table,
                                           int64_t panel) {
  constexpr int64_t kAheadBytes = 4096;
  const int64_t per_step = kPerStep(table);
  const std::byte* w = a.w + panel * a.panel_stride;
  const int64_t stride = a.panel_stride;
  const int64_t parameters = a.x_sums != nullptr ? 128 : 64;
  const uint16_t* x = a.x;
  float* c = a.c + 16 * panel;
  // 4 KiB ahead of each panel, then the beginning of the panels that come next.
  const std::byte* const end = w + stride;
  const std::byte* ahead = stride > kAheadBytes ? w + kAheadBytes : a.next + panel * stride;
  const auto prefetch = [&](int64_t bytes) {
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) __builtin_prefetch(ahead + p * stride, 0, 2);
    ahead += bytes;
    if (ahead == end) ahead = a.next + panel * stride;
  };
  int64_t g = 0;
  for (int64_t begin = 0; begin < a.k; begin += a.group, ++g) {
    const int64_t count = a.k - begin < a.group ? a.k - begin : a.group;
    const int64_t steps = (count + per_step - 1) / per_step;
    Tile<kRows, kPanels> t;
    t.clear();
    x = a.x + begin;
    for (int64_t s = 0; s < steps; ++s) {
      prefetch(64);
      t.step(table, w, stride, x, a.x_stride);
      w += 64;
      x += per_step;
    }
    prefetch(64);
    if (parameters == 128) prefetch(64);
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      const auto* at = reinterpret_cast<const float*>(w + p * stride);
      const __m512 scale = _mm512_loadu_ps(at);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        __m512 y = t.acc[m][p];
        if (a.x_sums != nullptr)
          y = _mm512_fnmadd_ps(_mm512_loadu_ps(at + 16),
                               _mm512_set1_ps(a.x_sums[m * a.x_sums_stride + g]), y);
        float* to = c + m * a.c_stride + 16 * p;
        _mm512_storeu_ps(to, _mm512_fmadd_ps(scale, y,
                                             begin == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(to)));
      }
    }
    w += parameters;
  }
}

template <int kRows, typename Table>
void stream_rows(const CodesProduct& a, const Table& table) {
  int64_t p = 0;
  if constexpr (kRows <= 2) {
    for (; p + 8 <= a.panels; p += 8) stream_tile<kRows, 8>(a, table, p);
  }
  for (; p + 4 <= a.panels; p += 4) stream_tile<kRows, 4>(a, table, p);
  for (; p + 2 <= a.panels; p += 2) stream_tile<kRows, 2>(a, table, p);
  for (; p < a.panels; ++p) stream_tile<kRows, 1>(a, table, p);
}

template <typename Table>
void stream_all(const CodesProduct& a, const Table& table) {
  switch (a.rows) {
    case 1: return stream_rows<1>(a, table);
    case 2: return stream_rows<2>(a, table);
    case 3: return stream_rows<3>(a, table);
    default: return stream_rows<4>(a, table);
  }
}

void stream(const CodesProduct& a) {
  const uint16_t* table = table_of(a.codes, true);
  if (a.codes == Codes::k4)
    stream_all(a, Table4(table));
  else
    stream_all(a, Table8(table));
}

void expand_pairs(Codes codes, const std::byte* in, int64_t k, std::byte* out) {
  const uint16_t* values = table_of(codes, true);
  if (codes == Codes::k4) {
    const Table4 table(values);
    for (int64_t i = 0; i < k; i += 8, in += 64) {
      __m512i v[4];
      table.decode(in, v);
      _mm512_storeu_si512(out, v[0]);
      if (i + 2 < k) _mm512_storeu_si512(out + 64, v[1]);
      if (i + 4 < k) _mm512_storeu_si512(out + 128, v[2]);
      if (i + 6 < k) _mm512_storeu_si512(out + 192, v[3]);
      out += 256;
    }
    return;
  }
  const Table8 table(values);
  for (int64_t i = 0; i < k; i += 4, in += 64) {
    __m512i first;
    __m512i second;
    table.decode(_mm512_loadu_si512(in), first, second);
    _mm512_storeu_si512(out, first);
    if (i + 2 < k) _mm512_storeu_si512(out + 64, second);
    out += 128;
  }
}

void expand_any(Codes codes, const std::byte* in, int64_t k, bool pairs, std::byte* out) {
  if (pairs)
    expand_pairs(codes, in, k, out);
  else
    expand(codes, in, k, false, out);
}

}  // namespace

const phalanx::ops::cpu::IntegerKernels& phalanx::ops::cpu::avx512bf16_integer_kernels() {
  static constexpr IntegerKernels kernels{.multiply_int8 = multiply_int8,
                                          .quantise = quantise,
                                          .finish_int8 = finish_int8,
                                          .expand = expand_any,
                                          .sum_groups = sum_groups,
                                          .apply = apply,
                                          .peak = peak,
                                          .stream = stream};
  return kernels;
}
