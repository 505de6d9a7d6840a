#include "phalanx/ops/cpu/linear_float.h"

#include <algorithm>

#include "phalanx/ops/cpu/cpu.h"

namespace phalanx::ops::cpu {
namespace {

constexpr int64_t kPanel = tensor::kPanelRows;

// k in one call: all of it when the weights pass by once, else what stays in the L2 cache
// (kGroupPanels panels) and, times kTileRows rows of x, in L1.
int64_t k_block(int64_t tokens, int64_t k, bool pairs, bool widens) {
  if (tokens <= kTileRows) return k;
  return widens ? kWidenK : pairs ? 2048 : 1024;
}

}  // namespace

FloatInputs float_inputs(Context& ctx, const MatrixView& x, const PackedLinear& w) {
  const Context::Scratch& scratch = ctx.scratch();
  const Kernels& kernels = *scratch.kernels;
  const bool pairs = w.dtype == DType::kBF16 && kernels.pairs;
  if (w.dtype != DType::kBF16 || pairs) return {x.row<const std::byte>(0), x.stride, pairs};
  PHALANX_CHECK(x.rows <= scratch.max_tokens && x.cols <= scratch.max_k);
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, x.cols));
  ctx.pool().for_each(x.rows, grain, [&](int64_t t) {
    kernels.convert(x.row<const uint16_t>(t), true, x.cols, scratch.widened + t * x.cols, false);
  });
  return {reinterpret_cast<const std::byte*>(scratch.widened), x.cols, false};
}

void multiply_float(const Kernels& kernels, const FloatItem& item, const ThreadScratch& thread) {
  const PackedLinear& w = item.w;
  const FloatInputs& inputs = item.inputs;
  const auto multiply = w.dtype == DType::kBF16  ? kernels.multiply_bf16
                        : w.dtype == DType::kF16 ? kernels.multiply_f16
                                                 : kernels.multiply_f32;
  const int64_t bytes_per_k = kPanel * static_cast<int64_t>(tensor::dtype_bytes(w.dtype));
  const std::byte* weights = w.data + item.panels.begin * item.panel_bytes;
  // Where register tiles are narrow, half-wide weights are widened once for all tokens of an item,
  // not once for each tile of rows.
  const bool widens =
      kernels.narrow && w.dtype != DType::kF32 && item.all_tokens > 2 * kTileRows;
  const int64_t step = k_block(item.all_tokens, w.k, inputs.pairs, widens);
  for (int64_t k = 0; k < w.k; k += step) {
    const int64_t count = std::min(step, w.k - k);
    Product product{
        .x = inputs.x + (item.tokens.begin * inputs.stride + k) * inputs.element_bytes(),
        .x_stride = inputs.stride,
        .rows = item.tokens.size(),
        .w = weights + k * bytes_per_k,
        .panel_stride = item.panel_bytes,
        .panels = item.panels.size(),
        .k = count,
        .c = thread.sums,
        .c_stride = item.sum_stride,
        .accumulate = k > 0};
    if (!widens) {
      product.next = k + step >= w.k ? item.next : product.w + step * bytes_per_k;
      multiply(product);
      continue;
    }
    const int64_t padded = count + count % 2;
    const auto widen = w.dtype == DType::kBF16 ? kernels.widen_bf16 : kernels.widen_f16;
    for (int64_t p = 0; p < item.panels.size(); ++p)
      widen(product.w + p * item.panel_bytes, padded, thread.widened + p * padded * kPanel);
    product.w = reinterpret_cast<const std::byte*>(thread.widened);
    product.panel_stride = padded * kPanel * static_cast<int64_t>(sizeof(float));
    kernels.multiply_f32(product);
  }
}

}  // namespace phalanx::ops::cpu
