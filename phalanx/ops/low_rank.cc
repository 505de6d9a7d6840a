#include "phalanx/ops/low_rank.h"

#include <algorithm>
#include <cstring>

#include "phalanx/base/check.h"
#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/cpu/kernels.h"
#include "phalanx/ops/packing.h"
#include "phalanx/ops/ref/element.h"
#include "phalanx/ops/ref/ref.h"
#include "phalanx/ops/scratch.h"

namespace phalanx::ops {
namespace {

constexpr int64_t kPanel = tensor::kPanelRows;
constexpr int64_t kRowBlock = 8;  // rows whose A x one thread computes
constexpr int64_t kUnit = cpu::kGroupPanels;

int64_t padded(int64_t n) { return panels_of(n) * kPanel; }

std::byte* element(const MatrixView& m, int64_t row, int64_t column) {
  return static_cast<std::byte*>(m.data) +
         (row * m.stride + column) * static_cast<int64_t>(tensor::dtype_bytes(m.dtype));
}

// Panels [begin, begin + count) of w for `rows` rows of x, k in one call.
void multiply(const cpu::Kernels* kernels, const float* x, int64_t x_stride, int64_t rows,
              const PackedLinear& w, int64_t begin, int64_t count, float* c, int64_t c_stride) {
  const int64_t bytes = panel_bytes(w.k, DType::kF32);
  const std::byte* panels = w.data + begin * bytes;
  if (kernels != nullptr)
    return kernels->multiply_f32({.x = x,
                                  .x_stride = x_stride,
                                  .rows = rows,
                                  .w = panels,
                                  .panel_stride = bytes,
                                  .panels = count,
                                  .k = w.k,
                                  .c = c,
                                  .c_stride = c_stride});
  const PackedLinear part{.data = panels, .rows = count * kPanel, .k = w.k, .dtype = DType::kF32};
  ref::linear({const_cast<float*>(x), DType::kF32, rows, w.k, x_stride}, part, nullptr,
              {c, DType::kF32, rows, count * kPanel, c_stride}, NumericClass::kFma32);
}

void widen_row(const cpu::Kernels* kernels, const MatrixView& x, int64_t row, float* out) {
  const bool bf16 = x.dtype == DType::kBF16;
  if (kernels != nullptr) return kernels->convert(element(x, row, 0), bf16, x.cols, out, false);
  for (int64_t i = 0; i < x.cols; ++i) out[i] = ref::load(element(x, row, 0), x.dtype, i);
}

// n <= 16 neighbours: out = round(out + delta).
void add_to(const cpu::Kernels* kernels, const float* delta, int64_t n, std::byte* out,
            DType dtype) {
  if (kernels == nullptr) {
    for (int64_t i = 0; i < n; ++i) ref::store(out, dtype, i, ref::load(out, dtype, i) + delta[i]);
    return;
  }
  if (dtype == DType::kF32) return kernels->add(reinterpret_cast<float*>(out), delta, false, n);
  alignas(64) float sum[kPanel];
  kernels->convert(out, true, n, sum, false);
  kernels->add(sum, delta, false, n);
  kernels->convert(sum, false, n, out, true);
}

void check_part(const LowRankPart& part, const MatrixView& x) {
  const PackedLinear& a = *part.a;
  const PackedLinear& b = *part.b;
  PHALANX_CHECK(a.dtype == DType::kF32 && b.dtype == DType::kF32 && a.k == x.cols && b.k == a.rows);
  PHALANX_CHECK(a.rows > 0 && a.data != nullptr && (b.rows == 0 || b.data != nullptr));
  PHALANX_CHECK(part.out.dtype == DType::kF32 || part.out.dtype == DType::kBF16);
  PHALANX_CHECK(b.rows == 0 ||
                (b.rows - 1) / kPanel * part.panel_stride + (b.rows - 1) % kPanel < part.out.cols);
}

}  // namespace

void low_rank(Context& ctx, const MatrixView& x, std::span<const int32_t> rows, int64_t first,
              std::span<const LowRankPart> parts, const LowRankScratch& scratch) {
  const auto count = static_cast<int64_t>(rows.size());
  PHALANX_CHECK(count <= kLowRankRows && x.cols <= scratch.max_k);
  const cpu::Kernels* kernels = ctx.scratch().kernels;
  int64_t width = 0;  // of A x of all parts
  int64_t units = 0;  // groups of B's panels, of all parts
  for (const LowRankPart& part : parts) {
    check_part(part, x);
    PHALANX_CHECK(count == 0 || (rows.front() >= first && rows.back() - first < part.out.rows));
    width += padded(part.a->rows);
    units += (panels_of(part.b->rows) + kUnit - 1) / kUnit;
  }
  PHALANX_CHECK(width <= scratch.reduced_stride);
  if (count == 0 || units == 0) return;

  const int64_t stride = scratch.reduced_stride;
  ctx.pool().for_each((count + kRowBlock - 1) / kRowBlock, 1, [&](int64_t block) {
    const int64_t begin = block * kRowBlock;
    const int64_t end = std::min(begin + kRowBlock, count);
    float* inputs = scratch.inputs + begin * scratch.max_k;
    for (int64_t i = begin; i < end; ++i)
      widen_row(kernels, x, rows[static_cast<size_t>(i)], inputs + (i - begin) * scratch.max_k);
    float* reduced = scratch.reduced + begin * stride;
    for (const LowRankPart& part : parts) {
      const int64_t panels = panels_of(part.a->rows);
      for (int64_t p = 0; p < panels; p += kUnit)
        multiply(kernels, inputs, scratch.max_k, end - begin, *part.a, p,
                 std::min(kUnit, panels - p), reduced + p * kPanel, stride);
      reduced += panels * kPanel;
    }
  });

  ctx.pool().for_each(units, 1, [&](int64_t unit) {
    const float* reduced = scratch.reduced;
    const LowRankPart* part = parts.data();
    for (;; ++part) {
      const int64_t own = (panels_of(part->b->rows) + kUnit - 1) / kUnit;
      if (unit < own) break;
      unit -= own;
      reduced += padded(part->a->rows);
    }
    const int64_t begin = unit * kUnit;
    const int64_t end = std::min(begin + kUnit, panels_of(part->b->rows));
    alignas(64) float sums[kRowBlock * kUnit * kPanel];
    for (int64_t t = 0; t < count; t += kRowBlock) {
      const int64_t some = std::min(kRowBlock, count - t);
      multiply(kernels, reduced + t * stride, stride, some, *part->b, begin, end - begin, sums,
               kUnit * kPanel);
      for (int64_t i = 0; i < some; ++i) {
        const int64_t row = rows[static_cast<size_t>(t + i)] - first;
        for (int64_t p = begin; p < end; ++p)
          add_to(kernels, sums + (i * kUnit + p - begin) * kPanel,
                 std::min(kPanel, part->b->rows - p * kPanel),
                 element(part->out, row, p * part->panel_stride), part->out.dtype);
      }
    }
  });
}

void gated_sums(Context& ctx, const MatrixView& x, const PackedGated& w, const MatrixView& sums,
                const MatrixView& half) {
  PHALANX_CHECK(sums.dtype == DType::kF32 && sums.rows == x.rows && sums.stride == sums.cols &&
                sums.cols == 2 * padded(w.rows));
  if (w.halves.empty()) {
    PackedLinear panels = w.panels;
    panels.own_bias = nullptr;
    return linear(ctx, x, panels, nullptr, sums);
  }
  PHALANX_CHECK(half.rows == x.rows && half.cols == w.rows && half.stride == w.rows);
  for (size_t which = 0; which < 2; ++which) {
    PackedLinear one = w.halves[which];
    one.own_bias = nullptr;
    linear(ctx, x, one, nullptr, half);
    for (int64_t t = 0; t < x.rows; ++t)
      for (int64_t n = 0; n < w.rows; n += kPanel)
        std::memcpy(sums.row<float>(t) + 2 * n + static_cast<int64_t>(which) * kPanel,
                    half.row<float>(t) + n,
                    static_cast<size_t>(std::min(kPanel, w.rows - n)) * sizeof(float));
  }
}

void gated_finish(Context& ctx, const MatrixView& sums, const PackedGated& w,
                  const float* gate_bias, const float* up_bias, const MatrixView& out) {
  if (w.own_gate_bias != nullptr) gate_bias = w.own_gate_bias;
  if (w.own_up_bias != nullptr) up_bias = w.own_up_bias;
  PHALANX_CHECK(out.rows == sums.rows && out.cols == w.rows && sums.cols == 2 * padded(w.rows));
  const cpu::Kernels* kernels = ctx.scratch().kernels;
  ctx.pool().for_each(out.rows, 1, [&](int64_t t) {
    if (kernels != nullptr)
      return kernels->finish_gated(sums.row<float>(t), sums.stride, 1, w.rows, gate_bias, up_bias,
                                   element(out, t, 0), out.stride, out.dtype == DType::kBF16);
    for (int64_t n = 0; n < w.rows; ++n) {
      const float* pair = sums.row<float>(t) + n / kPanel * 2 * kPanel + n % kPanel;
      const float gate = pair[0] + (gate_bias != nullptr ? gate_bias[n] : 0.0f);
      const float up = pair[kPanel] + (up_bias != nullptr ? up_bias[n] : 0.0f);
      ref::store(element(out, t, 0), out.dtype, n, ref::silu(gate) * up);
    }
  });
}

}  // namespace phalanx::ops
