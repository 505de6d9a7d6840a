#include "phalanx/ops/heads.h"

#include <algorithm>
#include <array>
#include <atomic>

#include "phalanx/base/check.h"
#include "phalanx/ops/cpu/kernels.h"
#include "phalanx/ops/head_rows.h"
#include "phalanx/ops/packing.h"
#include "phalanx/ops/ref/ref.h"
#include "phalanx/ops/scratch.h"

namespace phalanx::ops {
namespace {

constexpr int64_t kTokens = 24;  // of one item

}  // namespace

void head_linear(Context& ctx, const MatrixView& x, HeadColumns x_columns, const PackedHeads& w,
                 const MatrixView& out, HeadColumns out_columns) {
  PHALANX_CHECK(w.dtype == DType::kBF16 ? x.dtype == DType::kBF16
                                        : w.dtype == DType::kF32 && x.dtype == DType::kF32);
  PHALANX_CHECK(x.rows == out.rows && w.k <= kMaxHeadWidth);
  PHALANX_CHECK(w.heads == 0 || (x_columns.begin + (w.heads - 1) * x_columns.period + w.k <= x.cols &&
                                 out_columns.begin + (w.heads - 1) * out_columns.period + w.rows <=
                                     out.cols));
  const cpu::Kernels* kernels = ctx.scratch().kernels;
  if (kernels == nullptr) {
    for (int64_t h = 0; h < w.heads; ++h)
      ref::linear(x.columns(x_columns.begin + h * x_columns.period, w.k), w.head(h), nullptr,
                  out.columns(out_columns.begin + h * out_columns.period, w.rows),
                  NumericClass::kFma32);
    return;
  }
  const bool bf16 = w.dtype == DType::kBF16;
  const bool widen = bf16 && !kernels->pairs;
  const auto x_bytes = static_cast<int64_t>(tensor::dtype_bytes(x.dtype));
  const auto out_bytes = static_cast<int64_t>(tensor::dtype_bytes(out.dtype));
  const int64_t blocks = (x.rows + kTokens - 1) / kTokens;
  const int64_t panels = panels_of(w.rows);
  const int64_t panel = panel_bytes(w.k, w.dtype);
  ctx.scratch().next_item.store(0, std::memory_order_relaxed);
  ctx.pool().run([&](int thread) {
    float* sums = ctx.scratch().threads[static_cast<size_t>(thread)].sums;
    alignas(64) std::array<float, kTokens * kMaxHeadWidth> widened;
    for (;;) {
      const int64_t item = ctx.scratch().next_item.fetch_add(1, std::memory_order_relaxed);
      if (item >= w.heads * blocks) return;
      const int64_t h = item / blocks;
      const int64_t t = item % blocks * kTokens;
      const int64_t count = std::min(kTokens, x.rows - t);
      const std::byte* in =
          static_cast<const std::byte*>(x.data) +
          (t * x.stride + x_columns.begin + h * x_columns.period) * x_bytes;
      if (widen)
        for (int64_t i = 0; i < count; ++i)
          kernels->convert(in + i * x.stride * x_bytes, true, w.k, widened.data() + i * w.k, false);
      std::byte* to = static_cast<std::byte*>(out.data) +
                      (t * out.stride + out_columns.begin + h * out_columns.period) * out_bytes;
      const std::byte* weights = w.data + h * w.head_bytes();
      for (int64_t p = 0; p < panels; p += cpu::kGroupPanels) {
        const int64_t taken = std::min(cpu::kGroupPanels, panels - p);
        const int64_t first = p * tensor::kPanelRows;
        (bf16 ? kernels->multiply_bf16 : kernels->multiply_f32)(
            {.x = widen ? static_cast<const void*>(widened.data()) : in,
             .x_stride = widen ? w.k : x.stride,
             .rows = count,
             .w = weights + p * panel,
             .panel_stride = panel,
             .panels = taken,
             .k = w.k,
             .c = sums,
             .c_stride = cpu::kGroupPanels * tensor::kPanelRows});
        kernels->finish(sums, cpu::kGroupPanels * tensor::kPanelRows, count,
                        std::min(taken * tensor::kPanelRows, w.rows - first), nullptr,
                        to + first * out_bytes, out.stride, out.dtype == DType::kBF16);
      }
    }
  });
}

}  // namespace phalanx::ops
