#include "phalanx/ops/head_rows.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "phalanx/base/check.h"
#include "phalanx/ops/ref/element.h"

namespace phalanx::ops {
namespace {

void normalise(float* values, const HeadRows& rows) {
  float lanes[16] = {};
  for (int64_t i = 0; i < rows.head_dim; ++i) lanes[i % 16] += values[i] * values[i];
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  const float scale =
      1.0F / std::sqrt(lanes[0] / static_cast<float>(rows.head_dim) + rows.eps);
  for (int64_t i = 0; i < rows.head_dim; ++i) values[i] = values[i] * scale * rows.norm[i];
}

}  // namespace

void prepare_heads(Context& ctx, const MatrixView& x, const HeadRows& rows) {
  PHALANX_CHECK(x.dtype == DType::kBF16 || x.dtype == DType::kF32);
  PHALANX_CHECK(rows.head_dim > 0 && rows.head_dim <= kMaxHeadWidth && rows.interleaved % 2 == 0 &&
                rows.interleaved <= rows.head_dim);
  PHALANX_CHECK(rows.begin >= 0 && rows.begin + rows.heads * rows.head_dim <= x.cols);
  if (rows.norm == nullptr && rows.interleaved == 0) return;
  const int64_t width = std::max<int64_t>(1, rows.heads * rows.head_dim);
  ctx.pool().for_each(x.rows, std::max<int64_t>(1, 16384 / width), [&](int64_t t) {
    std::array<float, kMaxHeadWidth> values;
    for (int64_t h = 0; h < rows.heads; ++h) {
      const int64_t at = t * x.stride + rows.begin + h * rows.head_dim;
      for (int64_t i = 0; i < rows.head_dim; ++i)
        values[static_cast<size_t>(i)] = ref::load(x.data, x.dtype, at + i);
      if (rows.norm != nullptr) normalise(values.data(), rows);
      const int64_t half = rows.interleaved / 2;
      for (int64_t i = 0; i < rows.head_dim; ++i) {
        const int64_t from = i < half ? 2 * i : i < 2 * half ? 2 * (i - half) + 1 : i;
        ref::store(x.data, x.dtype, at + i, values[static_cast<size_t>(from)]);
      }
    }
  });
}

}  // namespace phalanx::ops
