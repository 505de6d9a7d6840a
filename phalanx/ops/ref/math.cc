#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "phalanx/ops/ref/ref.h"

namespace phalanx::ops::ref {
namespace {

float flush(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

}  // namespace

float exp32(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = std::fma(x, 1.44269504088896341f, kMagic);
  const float n = shifted - kMagic;
  float r = std::fma(n, -0.693359375f, x);
  r = std::fma(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p, r * r, r) + 1.0f;
  const float scale = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  if (x < -87.33f) return 0.0f;
  if (x > 88.37f) return std::numeric_limits<float>::infinity();
  return p * scale;
}

float silu(float x) { return x / (1.0f + exp32(-x)); }

float dot_pair(float acc, float w0, float w1, float x0, float x1) {
  acc = flush(std::fma(flush(w1), flush(x1), flush(acc)));
  return flush(std::fma(flush(w0), flush(x0), acc));
}

float dot_tile(float acc, const float* w, const float* x) {
  float even = 0;
  float odd = 0;
  for (int k = 0; k < 32; k += 2) {
    even = flush(std::fma(flush(x[k]), flush(w[k]), even));
    odd = flush(std::fma(flush(x[k + 1]), flush(w[k + 1]), odd));
  }
  return flush(flush(acc) + flush(even + odd));
}

}  // namespace phalanx::ops::ref
