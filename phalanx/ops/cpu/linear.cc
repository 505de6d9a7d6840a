#include <algorithm>

#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/cpu/linear_float.h"
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

// finish(sums, stride of their rows, panels, tokens): the epilogue of one item.
template <typename Finish>
void multiply(Context& ctx, const MatrixView& x, const PackedLinear& w, Finish finish) {
  Context::Scratch& scratch = ctx.scratch();
  ThreadPool& pool = ctx.pool();
  if (x.rows == 0 || w.rows == 0) return;

  const FloatInputs inputs = float_inputs(ctx, x, w);
  const int64_t panel = panel_bytes(w.k, w.dtype);
  const int64_t threads = pool.size();
  const Plan plan = make_plan(panels_of(w.rows), x.rows, threads);
  const int64_t count = plan.items();
  const int64_t sum_stride = std::max(plan.unit, kGroupPanels) * kPanel;
  auto weights_of = [&](int64_t item) { return w.data + plan.panels_of_item(item).begin * panel; };

  auto run_item = [&](const ThreadScratch& t, int64_t item, const std::byte* next) {
    const Range panels = plan.panels_of_item(item);
    const Range tokens = plan.tokens_of_item(item);
    multiply_float(*scratch.kernels,
                   {.w = w,
                    .inputs = inputs,
                    .tokens = tokens,
                    .all_tokens = x.rows,
                    .panel_bytes = panel,
                    .panels = panels,
                    .next = next,
                    .sum_stride = sum_stride},
                   t);
    finish(t.sums, sum_stride, panels, tokens);
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
