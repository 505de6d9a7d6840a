#include <algorithm>

#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/cpu/kernels.h"
#include "phalanx/ops/cpu/runs.h"
#include "phalanx/ops/packing.h"
#include "phalanx/ops/scratch.h"

namespace phalanx::ops::cpu {
namespace {

using tensor::Range;
constexpr int64_t kPanel = tensor::kPanelRows;

// How a product is cut: items of `unit` panels by `block` tokens, all tokens of a unit in a row.
struct Plan {
  int64_t panels = 0;
  int64_t unit = 0;
  int64_t tokens = 0;
  int64_t blocks = 0;  // of tokens

  [[nodiscard]] int64_t items() const { return (panels + unit - 1) / unit * blocks; }
  [[nodiscard]] Range panels_of_item(int64_t item) const {
    const int64_t begin = item / blocks * unit;
    return {begin, std::min(begin + unit, panels)};
  }
  [[nodiscard]] Range tokens_of_item(int64_t item) const {
    const int64_t block = item % blocks;
    return {tokens * block / blocks, tokens * (block + 1) / blocks};
  }
};

Plan make_plan(int64_t panels, int64_t tokens, int64_t threads) {
  Plan plan{.panels = panels,
            .unit = tokens <= kWideRows ? kWidePanels : kGroupPanels,
            .tokens = tokens};
  plan.blocks = (tokens + kTokenBlock - 1) / kTokenBlock;
  if (threads > 1) {
    while (plan.items() < 8 * threads && tokens / plan.blocks >= 8 * kTileRows) ++plan.blocks;
    while (plan.items() < 8 * threads && plan.unit > 2) plan.unit /= 2;
  }
  return plan;
}

// k in one call: all of it when the weights pass by once, else what stays in the L2 cache
// (kGroupPanels panels) and, times kTileRows rows of x, in L1.
int64_t k_block(int64_t tokens, const PackedLinear& w, bool pairs, bool widens) {
  if (tokens <= kTileRows) return w.k;
  return widens ? kWidenK : pairs ? 2048 : 1024;
}

// finish(sums, stride of their rows, panels, tokens): the epilogue of one item.
template <typename Finish>
void multiply(Context& ctx, const MatrixView& x, const PackedLinear& w, Finish finish) {
  Context::Scratch& scratch = ctx.scratch();
  const Kernels& kernels = *scratch.kernels;
  ThreadPool& pool = ctx.pool();
  if (x.rows == 0 || w.rows == 0) return;

  const bool pairs = w.dtype == DType::kBF16 && kernels.pairs;
  const void* input = x.data;
  int64_t stride = x.stride;
  if (w.dtype == DType::kBF16 && !pairs) {
    PHALANX_CHECK(x.rows <= scratch.max_tokens && x.cols <= scratch.max_k);
    const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, x.cols));
    pool.for_each(x.rows, grain, [&](int64_t t) {
      kernels.convert(x.row<const uint16_t>(t), true, x.cols, scratch.widened + t * x.cols, false);
    });
    input = scratch.widened;
    stride = x.cols;
  }
  const auto call = w.dtype == DType::kBF16  ? kernels.multiply_bf16
                    : w.dtype == DType::kF16 ? kernels.multiply_f16
                                             : kernels.multiply_f32;
  const int64_t x_bytes = pairs ? 2 : 4;
  const int64_t bytes_per_k = kPanel * static_cast<int64_t>(tensor::dtype_bytes(w.dtype));
  const int64_t panel = panel_bytes(w.k, w.dtype);
  const int64_t threads = pool.size();
  const Plan plan = make_plan(panels_of(w.rows), x.rows, threads);
  // Where register tiles are narrow, half-wide weights are widened once for all tokens of an item,
  // not once for each tile of rows.
  const bool widens = kernels.narrow && w.dtype != DType::kF32 && x.rows > 2 * kTileRows;
  const auto widen = w.dtype == DType::kBF16 ? kernels.widen_bf16 : kernels.widen_f16;
  const int64_t step = k_block(x.rows, w, pairs, widens);
  const int64_t count = plan.items();
  const int64_t sum_stride = std::max(plan.unit, kGroupPanels) * kPanel;
  auto weights_of = [&](int64_t item) { return w.data + plan.panels_of_item(item).begin * panel; };

  auto run_item = [&](const ThreadScratch& t, int64_t item, const std::byte* next) {
    float* sums = t.sums;
    const Range panels = plan.panels_of_item(item);
    const Range tokens = plan.tokens_of_item(item);
    const std::byte* weights = weights_of(item);
    for (int64_t k = 0; k < w.k; k += step) {
      const bool last = k + step >= w.k;
      if (widens) {
        const int64_t count = std::min(step, w.k - k);
        const int64_t padded = count + count % 2;
        for (int64_t p = 0; p < panels.size(); ++p)
          widen(weights + p * panel + k * bytes_per_k, padded, t.widened + p * padded * kPanel);
        kernels.multiply_f32({.x = static_cast<const float*>(input) + tokens.begin * stride + k,
                              .x_stride = stride,
                              .rows = tokens.size(),
                              .w = reinterpret_cast<const std::byte*>(t.widened),
                              .panel_stride = padded * kPanel * static_cast<int64_t>(sizeof(float)),
                              .panels = panels.size(),
                              .k = count,
                              .c = sums,
                              .c_stride = sum_stride,
                              .accumulate = k > 0});
        continue;
      }
      call({.x = static_cast<const std::byte*>(input) + (tokens.begin * stride + k) * x_bytes,
            .x_stride = stride,
            .rows = tokens.size(),
            .w = weights + k * bytes_per_k,
            .panel_stride = panel,
            .panels = panels.size(),
            .k = std::min(step, w.k - k),
            .c = sums,
            .c_stride = sum_stride,
            .accumulate = k > 0,
            .next = last ? next : weights + (k + step) * bytes_per_k});
    }
    finish(sums, sum_stride, panels, tokens);
  };

  scratch.next_item.store(0, std::memory_order_relaxed);
  pool.run([&](int thread) {
    const ThreadScratch& t = scratch.threads[static_cast<size_t>(thread)];
    Range now = take_run(scratch.next_item, count, threads);
    while (now.size() > 0) {
      const Range then = take_run(scratch.next_item, count, threads);
      for (int64_t item = now.begin; item < now.end; ++item) {
        const int64_t following = item + 1 < now.end ? item + 1
                                  : then.size() > 0  ? then.begin
                                                     : item;
        run_item(t, item, weights_of(following));
      }
      now = then;
    }
  });
}

}  // namespace

void linear(Context& ctx, const MatrixView& x, const PackedLinear& w, const float* bias,
            const MatrixView& out) {
  const Kernels& kernels = *ctx.scratch().kernels;
  const bool bf16 = out.dtype == DType::kBF16;
  const auto bytes = static_cast<int64_t>(tensor::dtype_bytes(out.dtype));
  multiply(ctx, x, w, [&](const float* sums, int64_t stride, Range panels, Range tokens) {
    const int64_t n = panels.begin * kPanel;
    const int64_t cols = std::min(panels.end * kPanel, w.rows) - n;
    kernels.finish(sums, stride, tokens.size(), cols, bias != nullptr ? bias + n : nullptr,
                   out.row<std::byte>(0) + (tokens.begin * out.stride + n) * bytes, out.stride,
                   bf16);
  });
}

void gated_linear(Context& ctx, const MatrixView& x, const PackedGated& w, const float* gate_bias,
                  const float* up_bias, const MatrixView& out) {
  const Kernels& kernels = *ctx.scratch().kernels;
  const bool bf16 = out.dtype == DType::kBF16;
  const auto bytes = static_cast<int64_t>(tensor::dtype_bytes(out.dtype));
  multiply(ctx, x, w.panels, [&](const float* sums, int64_t stride, Range panels, Range tokens) {
    const int64_t n = panels.begin / 2 * kPanel;
    const int64_t cols = std::min(panels.end / 2 * kPanel, w.rows) - n;
    kernels.finish_gated(
        sums, stride, tokens.size(), cols, gate_bias != nullptr ? gate_bias + n : nullptr,
        up_bias != nullptr ? up_bias + n : nullptr,
        out.row<std::byte>(0) + (tokens.begin * out.stride + n) * bytes, out.stride, bf16);
  });
}

}  // namespace phalanx::ops::cpu
