// The kernels of one path, over its 16-lane vector type V. Included by kernels_*.cc inside an
// unnamed namespace, after:
//   V              16 floats; zero(), set1(x), load(p), load_n(p, n), load_bf16(p), load_bf16_n,
//                  load_f16(p), even_bf16(p) and odd_bf16(p) (of 16 pairs), store(p, v),
//                  store_n(p, n, v), store_bf16(p, v), store_bf16_n(p, n, v), add, sub, mul, div,
//                  fma(a, b, c) = a * b + c, max (the second operand if either is NaN),
//                  negate, times_two_to(p, n, shifted, x, limit) = p * 2^n, 0 where x < limit
//                  (shifted: n + 1.5 * 2^23), above(x, limit, then, else), sum(v)
//   even_i8(p), odd_i8(p) (of 16 pairs), load_i8(p), store_i8_n(p, n, v) (nearest even, clamped,
//   NaN: 0), magnitude(v)
//   keep_alive(v)  the compiler must not look through v
//   kPeakChains    independent chains that fill the units and fit the registers
//   kTilePanels(rows)  panels of a register tile with `rows` rows; kStreamPanels(rows)  where all rows
//   pass by in one tile
// Loads of n elements give zeros beyond.

using phalanx::ops::cpu::kGroupPanels;
using phalanx::ops::cpu::kTileRows;
using phalanx::ops::cpu::Kernels;
using phalanx::ops::cpu::KvType;
using phalanx::ops::cpu::Product;
using phalanx::ops::cpu::Scores;
using phalanx::ops::cpu::Values;

// --- Products --------------------------------------------------------------------------------

struct WeightsF32 {
  using X = float;
  static constexpr int kStep = 1;          // k per step
  static constexpr int64_t kBytes = 64;    // of a panel per step
};
struct WeightsF16 {
  using X = float;
  static constexpr int kStep = 2;
  static constexpr int64_t kBytes = 64;
};
struct WeightsBf16 {
  using X = float;
  static constexpr int kStep = 2;
  static constexpr int64_t kBytes = 64;
};
struct WeightsI8 {  // pairs, for attention only
  using X = float;
  static constexpr int kStep = 2;
  static constexpr int64_t kBytes = 32;
};

template <int kRows, int kPanels>
struct Tile {
  V acc[kRows][kPanels];

  inline __attribute__((always_inline)) void fma_all(const V (&w)[kPanels], const float* x,
                                                     int64_t stride) {
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const V value = set1(x[m * stride]);
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) acc[m][p] = fma(w[p], value, acc[m][p]);
    }
  }

  inline __attribute__((always_inline)) void step(WeightsF32, const std::byte* w, int64_t stride,
                                                  const float* x, int64_t x_stride) {
    V v[kPanels];
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p)
      v[p] = load(reinterpret_cast<const float*>(w + p * stride));
    fma_all(v, x, x_stride);
  }
  inline __attribute__((always_inline)) void step(WeightsF16, const std::byte* w, int64_t stride,
                                                  const float* x, int64_t x_stride) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      V v[kPanels];
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) v[p] = load_f16(w + p * stride + h * 32);
      fma_all(v, x + h, x_stride);
    }
  }
  inline __attribute__((always_inline)) void step(WeightsBf16, const std::byte* w, int64_t stride,
                                                  const float* x, int64_t x_stride) {
    V v[kPanels];
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) v[p] = even_bf16(w + p * stride);
    fma_all(v, x, x_stride);
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) v[p] = odd_bf16(w + p * stride);
    fma_all(v, x + 1, x_stride);
  }
  inline __attribute__((always_inline)) void step(WeightsI8, const std::byte* w, int64_t stride,
                                                  const float* x, int64_t x_stride) {
    V v[kPanels];
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) v[p] = even_i8(w + p * stride);
    fma_all(v, x, x_stride);
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) v[p] = odd_i8(w + p * stride);
    fma_all(v, x + 1, x_stride);
  }
  // A step of which row m takes only positions begin[m] <= j < end[m]; j of the step's first one.
  template <typename W>
  inline __attribute__((always_inline)) void ragged(W, const std::byte* w, int64_t stride,
                                                    const float* x, int64_t x_stride, int64_t j,
                                                    const int32_t* begin, const int32_t* end) {
#pragma GCC unroll 2
    for (int h = 0; h < W::kStep; ++h) {
#pragma GCC unroll 6
      for (int m = 0; m < kRows; ++m) {
        if (j + h < begin[m] || j + h >= end[m]) continue;
        const V value = set1(x[m * x_stride + h]);
#pragma GCC unroll 8
        for (int p = 0; p < kPanels; ++p) {
          V v;
          if constexpr (__is_same(W, WeightsF32))
            v = load(reinterpret_cast<const float*>(w + p * stride));
          else if constexpr (__is_same(W, WeightsI8))
            v = h == 0 ? even_i8(w + p * stride) : odd_i8(w + p * stride);
          else
            v = h == 0 ? even_bf16(w + p * stride) : odd_bf16(w + p * stride);
          acc[m][p] = fma(v, value, acc[m][p]);
        }
      }
    }
  }
  // The last k of an odd number.
  template <typename W>
  inline __attribute__((always_inline)) void last(W, const std::byte* w, int64_t stride,
                                                  const float* x, int64_t x_stride) {
    V v[kPanels];
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      if constexpr (__is_same(W, WeightsF16))
        v[p] = load_f16(w + p * stride);
      else if constexpr (__is_same(W, WeightsI8))
        v[p] = even_i8(w + p * stride);
      else
        v[p] = even_bf16(w + p * stride);
    }
    fma_all(v, x, x_stride);
  }
#ifdef PHALANX_PAIRS
  template <typename W>
  inline __attribute__((always_inline)) void pair(W, const std::byte* w, int64_t stride,
                                                  const uint16_t* x, int64_t x_stride,
                                                  bool second) {
    __m512bh v[kPanels];
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) v[p] = W::load(w + p * stride);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      uint32_t two = 0;
      __builtin_memcpy(&two, x + m * x_stride, second ? 4 : 2);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(static_cast<int>(two));
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p)
        acc[m][p].v = _mm512_dpbf16_ps(acc[m][p].v, v[p], value);
    }
  }
  // The values that a row must not see are taken as zeros.
  template <typename W>
  inline __attribute__((always_inline)) void ragged(W, const std::byte* w, int64_t stride,
                                                    const uint16_t* x, int64_t x_stride, int64_t j,
                                                    const int32_t* begin, const int32_t* end) {
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const uint32_t mask = (j >= begin[m] && j < end[m] ? 0x0000ffffu : 0u) |
                            (j + 1 >= begin[m] && j + 1 < end[m] ? 0xffff0000u : 0u);
      if (mask == 0) continue;
      uint32_t two = 0;
      __builtin_memcpy(&two, x + m * x_stride, 4);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(static_cast<int>(two & mask));
      const __m512i seen = _mm512_set1_epi32(static_cast<int>(mask));
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p)
        acc[m][p].v = _mm512_dpbf16_ps(
            acc[m][p].v,
            (__m512bh)_mm512_and_si512((__m512i)W::load(w + p * stride), seen), value);
    }
  }
  inline __attribute__((always_inline)) void step(WeightsPairsI8 type, const std::byte* w,
                                                  int64_t stride, const uint16_t* x,
                                                  int64_t x_stride) {
    pair(type, w, stride, x, x_stride, true);
  }
  inline __attribute__((always_inline)) void last(WeightsPairsI8 type, const std::byte* w,
                                                  int64_t stride, const uint16_t* x,
                                                  int64_t x_stride) {
    pair(type, w, stride, x, x_stride, false);
  }
  inline __attribute__((always_inline)) void step(WeightsPairs type, const std::byte* w,
                                                  int64_t stride, const uint16_t* x,
                                                  int64_t x_stride) {
    pair(type, w, stride, x, x_stride, true);
  }
  inline __attribute__((always_inline)) void last(WeightsPairs type, const std::byte* w,
                                                  int64_t stride, const uint16_t* x,
                                                  int64_t x_stride) {
    pair(type, w, stride, x, x_stride, false);
  }
#endif
};

// How a tile asks for memory ahead of its use.
enum class Ahead {
  kNone,
  // Each panel 4 KiB ahead of itself, at its end the panels of `next`. Into L2: what L1 may ask for at
  // a time is less than the way to memory takes.
  kStream,
  kNextOne, // one panel of `next` per pass
  kNextTwo, // two panels of `next` per pass
};
constexpr int64_t kAheadBytes = 4096;

template <int kRows, int kPanels, Ahead kAhead, typename W>
__attribute__((noinline)) void run_tile(const typename W::X* x, int64_t x_stride,
                                        const std::byte* w, int64_t stride, int64_t k, float* c,
                                        int64_t c_stride, bool accumulate, const std::byte* next) {
  Tile<kRows, kPanels> t;
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p)
      t.acc[m][p] = accumulate ? load(c + m * c_stride + 16 * p) : zero();

  int64_t steps = k / W::kStep;
  if constexpr (kAhead == Ahead::kStream) {
    const int64_t near = steps > kAheadBytes / W::kBytes ? steps - kAheadBytes / W::kBytes : 0;
    for (int64_t s = 0; s < near; ++s) {
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p)
        __builtin_prefetch(w + p * stride + kAheadBytes, 0, 2);
      t.step(W{}, w, stride, x, x_stride);
      w += W::kBytes;
      x += W::kStep;
    }
    steps -= near;
  }
  for (int64_t s = 0; s < steps; ++s) {
    if constexpr (kAhead == Ahead::kStream) {
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) __builtin_prefetch(next + p * stride, 0, 2);
      next += W::kBytes;
    }
    if constexpr (kAhead == Ahead::kNextOne || kAhead == Ahead::kNextTwo) {
      __builtin_prefetch(next, 0, 2);
      if constexpr (kAhead == Ahead::kNextTwo) __builtin_prefetch(next + stride, 0, 2);
      next += W::kBytes;
    }
    t.step(W{}, w, stride, x, x_stride);
    w += W::kBytes;
    x += W::kStep;
  }
  if constexpr (W::kStep == 2) {
    if (k % 2 != 0) t.last(W{}, w, stride, x, x_stride);
  }

#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) store(c + m * c_stride + 16 * p, t.acc[m][p]);
}

// kRows rows against all panels of the product, in tiles as wide as the registers allow.
// pass: number of the row tile, of `passes`.
template <int kRows, typename W>
void run_rows(const Product& a, int64_t row, int64_t pass, int64_t passes) {
  constexpr int kWide = kTilePanels(kRows);
  const auto* x = static_cast<const typename W::X*>(a.x) + row * a.x_stride;
  float* c = a.c + row * a.c_stride;
  int64_t p = 0;
  auto call = [&](auto tile, const std::byte* next) {
    tile(x, a.x_stride, a.w + p * a.panel_stride, a.panel_stride, a.k, c + 16 * p, a.c_stride,
         a.accumulate, next);
  };
  if (a.next != nullptr && passes == 1) {
    constexpr int kStream = kStreamPanels(kRows);
    const auto stream = [&](auto tile) { call(tile, a.next + p * a.panel_stride); };
    for (; p + kStream <= a.panels; p += kStream)
      stream(run_tile<kRows, kStream, Ahead::kStream, W>);
    if constexpr (kStream > 4) {
      for (; p + 4 <= a.panels; p += 4) stream(run_tile<kRows, 4, Ahead::kStream, W>);
    }
    if constexpr (kStream > 2) {
      for (; p + 2 <= a.panels; p += 2) stream(run_tile<kRows, 2, Ahead::kStream, W>);
    }
    for (; p < a.panels; ++p) stream(run_tile<kRows, 1, Ahead::kStream, W>);
    return;
  }
  if (a.next != nullptr && kWide == kGroupPanels && a.panels == kGroupPanels) {
    if (passes >= kGroupPanels) {
      if (pass < kGroupPanels) {
        call(run_tile<kRows, kWide, Ahead::kNextOne, W>, a.next + pass * a.panel_stride);
        return;
      }
    } else if (2 * pass < kGroupPanels) {
      call(run_tile<kRows, kWide, Ahead::kNextTwo, W>, a.next + 2 * pass * a.panel_stride);
      return;
    }
  }
  for (; p + kWide <= a.panels; p += kWide)
    call(run_tile<kRows, kWide, Ahead::kNone, W>, nullptr);
  if constexpr (kWide > 2) {
    for (; p + 2 <= a.panels; p += 2) call(run_tile<kRows, 2, Ahead::kNone, W>, nullptr);
  }
  for (; p < a.panels; ++p) call(run_tile<kRows, 1, Ahead::kNone, W>, nullptr);
}

template <typename W>
void multiply(const Product& a) {
  // Tiles of equal height, so that no pass is left with a single row.
  const int64_t passes = (a.rows + kTileRows - 1) / kTileRows;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t row = a.rows * pass / passes;
    switch (a.rows * (pass + 1) / passes - row) {
      case 1: run_rows<1, W>(a, row, pass, passes); break;
      case 2: run_rows<2, W>(a, row, pass, passes); break;
      case 3: run_rows<3, W>(a, row, pass, passes); break;
      case 4: run_rows<4, W>(a, row, pass, passes); break;
      case 5: run_rows<5, W>(a, row, pass, passes); break;
      default: run_rows<6, W>(a, row, pass, passes); break;
    }
  }
}

void widen_bf16_panel(const std::byte* panel, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += 2, panel += 64, out += 32) {
    store(out, even_bf16(panel));
    store(out + 16, odd_bf16(panel));
  }
}

void widen_f16_panel(const std::byte* panel, int64_t k, float* out) {
  for (int64_t i = 0; i < k; ++i, panel += 32, out += 16) store(out, load_f16(panel));
}

// --- Elements --------------------------------------------------------------------------------

inline V load_any(const void* in, bool bf16, int64_t i, int64_t n) {
  if (bf16) {
    const uint16_t* p = static_cast<const uint16_t*>(in) + i;
    return n - i >= 16 ? load_bf16(p) : load_bf16_n(p, n - i);
  }
  const float* p = static_cast<const float*>(in) + i;
  return n - i >= 16 ? load(p) : load_n(p, n - i);
}

inline void store_any(void* out, bool bf16, int64_t i, int64_t n, V v) {
  if (bf16) {
    uint16_t* p = static_cast<uint16_t*>(out) + i;
    if (n - i >= 16)
      store_bf16(p, v);
    else
      store_bf16_n(p, n - i, v);
    return;
  }
  float* p = static_cast<float*>(out) + i;
  if (n - i >= 16)
    store(p, v);
  else
    store_n(p, n - i, v);
}

inline void* at(void* p, bool bf16, int64_t i) {
  return static_cast<std::byte*>(p) + i * (bf16 ? 2 : 4);
}
inline const void* at(const void* p, bool bf16, int64_t i) {
  return static_cast<const std::byte*>(p) + i * (bf16 ? 2 : 4);
}

// The sequence of ref::exp32, for arguments that are not large (NaN stays NaN).
inline V exp_to_88(V x) {
  const V magic = set1(12582912.0f);
  const V shifted = fma(x, set1(1.44269504088896341f), magic);
  const V n = sub(shifted, magic);
  V r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  return times_two_to(p, n, shifted, x, set1(-87.33f));
}
inline V exp(V x) { return above(x, set1(88.37f), set1(__builtin_inff()), exp_to_88(x)); }

void finish(const float* c, int64_t c_stride, int64_t rows, int64_t cols, const float* bias,
            void* out, int64_t out_stride, bool out_bf16) {
  for (int64_t m = 0; m < rows; ++m) {
    void* row = at(out, out_bf16, m * out_stride);
    for (int64_t i = 0; i < cols; i += 16) {
      V v = load(c + m * c_stride + i);
      if (bias != nullptr) v = add(v, load_any(bias, false, i, cols));
      store_any(row, out_bf16, i, cols, v);
    }
  }
}

void finish_gated(const float* c, int64_t c_stride, int64_t rows, int64_t cols,
                  const float* gate_bias, const float* up_bias, void* out, int64_t out_stride,
                  bool out_bf16) {
  for (int64_t m = 0; m < rows; ++m) {
    void* row = at(out, out_bf16, m * out_stride);
    for (int64_t i = 0; i < cols; i += 16) {
      V gate = load(c + m * c_stride + 2 * i);
      V up = load(c + m * c_stride + 2 * i + 16);
      if (gate_bias != nullptr) gate = add(gate, load_any(gate_bias, false, i, cols));
      if (up_bias != nullptr) up = add(up, load_any(up_bias, false, i, cols));
      const V silu = div(gate, add(set1(1.0f), exp(negate(gate))));
      store_any(row, out_bf16, i, cols, mul(silu, up));
    }
  }
}

void convert(const void* in, bool in_bf16, int64_t n, void* out, bool out_bf16) {
  for (int64_t i = 0; i < n; i += 16)
    store_any(out, out_bf16, i, n, load_any(in, in_bf16, i, n));
}

void add_rows(float* residual, const void* delta, bool delta_bf16, int64_t n) {
  for (int64_t i = 0; i < n; i += 16)
    store_any(residual, false, i, n,
              add(load_any(residual, false, i, n), load_any(delta, delta_bf16, i, n)));
}

void rms_norm(const float* x, const float* weight, float eps, const float* bias, int64_t n,
              void* out, bool out_bf16) {
  V squares = zero();
  for (int64_t i = 0; i < n; i += 16) {
    const V v = load_any(x, false, i, n);
    squares = fma(v, v, squares);
  }
  const float mean = sum(squares) / static_cast<float>(n);
  const V scale = set1(1.0f / square_root(mean + eps));
  for (int64_t i = 0; i < n; i += 16) {
    V v = mul(mul(load_any(x, false, i, n), scale), load_any(weight, false, i, n));
    if (bias != nullptr) v = add(v, load_any(bias, false, i, n));
    store_any(out, out_bf16, i, n, v);
  }
}

void rope(const void* in, bool in_bf16, const float* cos, const float* sin, int64_t half,
          int64_t head_dim, void* out, bool out_bf16) {
  const void* in_high = at(in, in_bf16, half);
  void* out_high = at(out, out_bf16, half);
  for (int64_t i = 0; i < half; i += 16) {
    const V c = load_any(cos, false, i, half);
    const V s = load_any(sin, false, i, half);
    const V low = load_any(in, in_bf16, i, half);
    const V high = load_any(in_high, in_bf16, i, half);
    store_any(out, out_bf16, i, half, fma(low, c, negate(mul(high, s))));
    store_any(out_high, out_bf16, i, half, fma(high, c, mul(low, s)));
  }
  if (in != out && 2 * half < head_dim)
    convert(at(in, in_bf16, 2 * half), in_bf16, head_dim - 2 * half,
            at(out, out_bf16, 2 * half), out_bf16);
}

// --- Attention -------------------------------------------------------------------------------

#include "phalanx/ops/cpu/attention.inl"

void merge(float* max_io, float* sum_io, float* o, float chunk_max, float chunk_sum,
           const float* chunk_o, int64_t n) {
  const float m = *max_io > chunk_max ? *max_io : chunk_max;
  const V a = exp(set1(*max_io - m));
  const V b = exp(set1(chunk_max - m));
  *max_io = m;
  float total[16];
  store(total, fma(set1(*sum_io), a, mul(set1(chunk_sum), b)));
  *sum_io = total[0];
  for (int64_t i = 0; i < n; i += 16)
    store(o + i, fma(load(o + i), a, mul(load(chunk_o + i), b)));
}

void divide(const float* o, float sum, const float* offset, const float* scale, int64_t n,
            void* out, bool out_bf16) {
  const V s = set1(sum);
  for (int64_t i = 0; i < n; i += 16) {
    V v = div(load_any(o, false, i, n), s);
    if (offset != nullptr) v = sub(v, load_any(offset, false, i, n));
    if (scale != nullptr) v = mul(v, load_any(scale, false, i, n));
    store_any(out, out_bf16, i, n, v);
  }
}

// --- Floors ----------------------------------------------------------------------------------

int64_t peak(int64_t steps, bool pairs) {
  constexpr int kChains = kPeakChains;
  V acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = set1(static_cast<float>(i));
  V a = set1(1.0f);
  V b = set1(1e-9f);
#ifdef PHALANX_PAIRS
  if (pairs) {
    for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i)
        acc[i].v = _mm512_dpbf16_ps(acc[i].v, (__m512bh)_mm512_castps_si512(a.v),
                                    (__m512bh)_mm512_castps_si512(b.v));
      keep_alive(a);
    }
    for (int i = 0; i < kChains; ++i) keep_alive(acc[i]);
    return steps * kChains * 64;
  }
#endif
  (void)pairs;
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = fma(a, b, acc[i]);
    keep_alive(a);
  }
  for (int i = 0; i < kChains; ++i) keep_alive(acc[i]);
  return steps * kChains * 32;
}

// One stream: no way of reading that was tried is faster.
float read(const float* memory, int64_t bytes) {
  V acc[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i < bytes / 4; i += 64) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const float* p = memory + i + 16 * k;
      __builtin_prefetch(p + kAheadBytes / 4, 0, 2);
      acc[k] = add(acc[k], load(p));
    }
  }
  return sum(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
}

constexpr Kernels make_kernels() {
  Kernels k;
  k.narrow = kTilePanels(kTileRows) < kGroupPanels;
#ifdef PHALANX_PAIRS
  k.pairs = true;
  k.multiply_bf16 = multiply<WeightsPairs>;
#else
  k.multiply_bf16 = multiply<WeightsBf16>;
#endif
  k.multiply_f16 = multiply<WeightsF16>;
  k.multiply_f32 = multiply<WeightsF32>;
  k.widen_bf16 = widen_bf16_panel;
  k.widen_f16 = widen_f16_panel;
  k.finish = finish;
  k.finish_gated = finish_gated;
  k.convert = convert;
  k.add = add_rows;
  k.rms_norm = rms_norm;
  k.rope = rope;
  k.scores = scores;
  k.values = values;
  k.scale = scale;
  k.quantise = quantise;
  k.widen_i8 = widen_i8;
  k.softmax = softmax;
  k.merge = merge;
  k.divide = divide;
  k.peak = peak;
  k.read = read;
  return k;
}
