#include "phalanx/engine/row_math.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

// Everything below is inlined into functions for one instruction set; nothing passes such a vector
// by value between two of them.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace phalanx::engine {

namespace {

constexpr int64_t kPiece = 1024;
constexpr int kWidth = 8;
constexpr int kLanes = 16;

using Floats = float __attribute__((vector_size(32)));
using Ints = int32_t __attribute__((vector_size(32)));

#define PHALANX_INLINE [[gnu::always_inline]] inline

PHALANX_INLINE Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
PHALANX_INLINE void store(float* p, const Floats& v) { std::memcpy(p, &v, sizeof(v)); }
PHALANX_INLINE Floats splat(float v) { return Floats{v, v, v, v, v, v, v, v}; }

// exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln 2 / 2; the polynomial is that of Cephes'
// expf. Adding 1.5 * 2^23 rounds to an integer, which then lies in the low bits.
PHALANX_INLINE Floats exp_not_positive(const Floats& argument) {
  const Ints tiny = argument < splat(-87.0f);
  const Floats x = tiny ? splat(-87.0f) : argument;
  const Floats shifted = x * splat(1.44269504088896341f) + splat(12582912.0f);
  const Floats n = shifted - splat(12582912.0f);
  const Floats r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  Floats p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  const Ints exponent = (reinterpret_cast<Ints>(shifted) - 0x4B400000) << 23;
  return tiny ? splat(0.0f) : reinterpret_cast<Floats>(reinterpret_cast<Ints>(p) + exponent);
}

PHALANX_INLINE double sum_lanes(const Floats (&lanes)[2]) {
  float four[4];
  for (int i = 0; i < 4; ++i) {
    four[i] = (lanes[0][i] + lanes[0][i + 4]) + (lanes[1][i] + lanes[1][i + 4]);
  }
  return static_cast<double>((four[0] + four[1]) + (four[2] + four[3]));
}

// The last count % 16 ids, with `fill` behind them.
struct Tail {
  Tail(const float* from, int64_t count, float fill) {
    std::fill_n(values, kLanes, fill);
    std::copy_n(from, count, values);
  }
  float values[kLanes];
};

PHALANX_INLINE double weigh_body(const float* x, int64_t count, float max, float scale,
                                 float least, float* out) {
  Floats sums[2] = {};
  const auto weigh = [&](const float* from, int half) __attribute__((always_inline)) {
    Floats w = exp_not_positive((load(from + half * kWidth) - splat(max)) * splat(scale));
    w = w < splat(least) ? splat(0.0f) : w;
    sums[half] += w;
    return w;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int half = 0; half < 2; ++half) {
      const Floats w = weigh(x + i, half);
      if (out != nullptr) store(out + i + half * kWidth, w);
    }
  }
  if (i < count) {
    Tail tail(x + i, count - i, -std::numeric_limits<float>::infinity());
    for (int half = 0; half < 2; ++half) {
      const Floats w = weigh(tail.values, half);
      store(tail.values + half * kWidth, w);
    }
    if (out != nullptr) std::copy_n(tail.values, count - i, out + i);
  }
  return sum_lanes(sums);
}

PHALANX_INLINE double mass_body(const float* weights, int64_t count, float least, int64_t* found) {
  Floats sums[2] = {};
  Ints counts = {};
  const auto add = [&](const float* from, int half) __attribute__((always_inline)) {
    const Floats w = load(from + half * kWidth);
    const Ints in = w >= splat(least);
    sums[half] += in ? w : splat(0.0f);
    counts -= in;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int half = 0; half < 2; ++half) add(weights + i, half);
  }
  if (i < count) {
    // Behind the end lies what never counts.
    const Tail tail(weights + i, count - i, -1.0f);
    for (int half = 0; half < 2; ++half) add(tail.values, half);
  }
  for (int lane = 0; lane < kWidth; ++lane) *found += counts[lane];
  return sum_lanes(sums);
}

#undef PHALANX_INLINE

double weigh_portable(const float* x, int64_t count, float max, float scale, float least,
                      float* out) {
  return weigh_body(x, count, max, scale, least, out);
}
double mass_portable(const float* weights, int64_t count, float least, int64_t* found) {
  return mass_body(weights, count, least, found);
}
[[gnu::target("avx2")]] double weigh_avx2(const float* x, int64_t count, float max, float scale,
                                          float least, float* out) {
  return weigh_body(x, count, max, scale, least, out);
}
[[gnu::target("avx2")]] double mass_avx2(const float* weights, int64_t count, float least,
                                         int64_t* found) {
  return mass_body(weights, count, least, found);
}

constexpr RowMath kPortable{.weigh = weigh_portable, .mass = mass_portable};
constexpr RowMath kAvx2{.weigh = weigh_avx2, .mass = mass_avx2};

}  // namespace

const RowMath& portable_row_math() { return kPortable; }

const RowMath& best_row_math() {
  return __builtin_cpu_supports("avx2") ? kAvx2 : kPortable;
}

float portable_exp(float x) {
  float out = 0;
  (void)weigh_portable(&x, 1, 0.0f, 1.0f, 0.0f, &out);
  return out;
}

double portable_log(double x) {
  int exponent = 0;
  double m = std::frexp(x, &exponent);  // exact; [0.5, 1)
  if (m < 0.70710678118654752) {
    m *= 2;
    --exponent;
  }
  // log(m) = 2 atanh(f), |f| <= 0.172.
  const double f = (m - 1) / (m + 1);
  const double f2 = f * f;
  double series = 0;
  for (int k = 23; k >= 1; k -= 2) series = series * f2 + 1.0 / k;
  return static_cast<double>(exponent) * 0.69314718055994531 + 2 * f * series;
}

double log_sum_exp(std::span<const float> row, float max) {
  const RowMath& math = best_row_math();
  double sum = 0;
  const auto size = static_cast<int64_t>(row.size());
  for (int64_t i = 0; i < size; i += kPiece) {
    sum += math.weigh(row.data() + i, std::min(kPiece, size - i), max, 1.0f, 0.0f, nullptr);
  }
  return static_cast<double>(max) + portable_log(sum);
}

}  // namespace phalanx::engine
