#include <cmath>
#include <cstdint>

#include "phalanx/base/check.h"
#include "phalanx/ops/ops.h"

namespace phalanx::ops {
namespace {

struct SinCos {
  double sin;
  double cos;
};

// For 0 <= x < 2^20: reduction by pi/2 in three parts and the kernels of fdlibm (k_sin.c, k_cos.c).
SinCos sin_cos(double x) {
  const double n = std::floor(x * 6.36619772367581382433e-01 + 0.5);
  double r = x - n * 1.57079632673412561417e+00;  // exact: 33 bits times 20 bits
  const double w = n * 6.07710050630396597660e-11;
  const double high = r - w;
  const double low = ((r - high) - w) - n * 2.02226624879595063154e-21;
  r = high + low;
  const double z = r * r;
  const double sin =
      r + r * z *
              (-1.66666666666666324348e-01 +
               z * (8.33333333332248946124e-03 +
                    z * (-1.98412698298579493134e-04 +
                         z * (2.75573137070700676789e-06 +
                              z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
  const double cos =
      1.0 - (0.5 * z -
             z * z *
                 (4.16666666666666019037e-02 +
                  z * (-1.38888888888741095749e-03 +
                       z * (2.48015872894767294178e-05 +
                            z * (-2.75573143513906633035e-07 +
                                 z * (2.08757232129817482790e-09 +
                                      z * -1.13596475577881948265e-11))))));
  switch (static_cast<int64_t>(n) & 3) {
    case 0: return {sin, cos};
    case 1: return {cos, -sin};
    case 2: return {-sin, -cos};
    default: return {-cos, sin};
  }
}

}  // namespace

void append_position(RopeTable& table, std::span<const float> inv_freq, float scale) {
  PHALANX_CHECK(static_cast<int64_t>(inv_freq.size()) * 2 == table.rotary_dim);
  const auto position = static_cast<float>(table.positions++);
  for (const float f : inv_freq) {
    // Rounded as the reference does: at large positions the rounding is what the model has learnt.
    const float angle = position * f;
    PHALANX_CHECK(angle >= 0 && angle < 0x1p20F * 1.5F);
    const SinCos value = sin_cos(static_cast<double>(angle));
    table.cos.push_back(static_cast<float>(value.cos) * scale);
    table.sin.push_back(static_cast<float>(value.sin) * scale);
  }
}

RopeTable make_rope_table(std::span<const float> inv_freq, int64_t positions, float scale) {
  RopeTable table;
  table.rotary_dim = 2 * static_cast<int64_t>(inv_freq.size());
  table.cos.reserve(static_cast<size_t>(positions) * inv_freq.size());
  table.sin.reserve(static_cast<size_t>(positions) * inv_freq.size());
  for (int64_t p = 0; p < positions; ++p) append_position(table, inv_freq, scale);
  return table;
}

}  // namespace phalanx::ops
