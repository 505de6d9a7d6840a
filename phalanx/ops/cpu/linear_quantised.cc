#include <algorithm>
#include <cstring>

#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/cpu/integer_kernels.h"
#include "phalanx/ops/cpu/kernels.h"
#include "phalanx/ops/cpu/linear_quantised.h"
#include "phalanx/ops/cpu/runs.h"
#include "phalanx/ops/packing.h"
#include "phalanx/ops/quantised.h"
#include "phalanx/ops/scratch.h"

namespace phalanx::ops::cpu {
namespace {

using quant::Storage;
using tensor::Range;
constexpr int64_t kPanel = tensor::kPanelRows;

Codes codes_of(Storage storage) {
  return storage == Storage::kCodes4   ? Codes::k4
         : storage == Storage::kCodes8 ? Codes::k8
                                       : Codes::kFp8;
}

void reorder(const MatrixView& x, int64_t t, const PackedLinear& w, bool widened, std::byte* out) {
  const bool bf16 = x.dtype == DType::kBF16;
  for (int64_t k = 0; k < w.k; ++k) {
    const int64_t from = w.order != nullptr ? w.order[k] : k;
    if (!bf16)
      reinterpret_cast<float*>(out)[k] = x.row<const float>(t)[from];
    else if (widened)
      reinterpret_cast<float*>(out)[k] = tensor::bf16_to_f32(x.row<const uint16_t>(t)[from]);
    else
      reinterpret_cast<uint16_t*>(out)[k] = x.row<const uint16_t>(t)[from];
  }
  const int64_t bytes = bf16 && !widened ? 2 : 4;
  std::memset(out + w.k * bytes, 0, static_cast<size_t>(((w.k + 15) / 16 * 16 - w.k) * bytes));
}

const float* int8_sums(const Context::Scratch& s, const QuantisedItem& i, ThreadScratch& thread) {
  constexpr int64_t kBlock = 2048;
  const int64_t padded = (i.w.k + 3) / 4 * 4;
  const int64_t step = i.tokens <= kTileRows ? padded : kBlock;
  const std::byte* w = i.w.data + i.panels.begin * i.panel_bytes;
  for (int64_t k = 0; k < padded; k += step) {
    const bool last = k + step >= padded;
    s.integers->multiply_int8({.x = reinterpret_cast<const int8_t*>(i.inputs.x) + k,
                               .x_stride = i.inputs.stride,
                               .rows = i.tokens,
                               .x_sum = i.inputs.token_sum,
                               .w = w + k * kPanel,
                               .panel_stride = i.panel_bytes,
                               .panels = i.panels.size(),
                               .k = std::min(step, padded - k),
                               .c = reinterpret_cast<int32_t*>(thread.sums),
                               .c_stride = i.sum_stride,
                               .accumulate = k > 0,
                               .next = last ? i.next : w + (k + step) * kPanel});
  }
  s.integers->finish_int8(thread.sums, i.sum_stride, i.tokens, i.panels.size(), w + padded * kPanel,
                          i.panel_bytes, i.inputs.token_scale, i.inputs.token_sum);
  return thread.sums;
}

// Few tokens of codes in one pass.
bool streams(const Context::Scratch& s, const PackedLinear& w, int64_t tokens, bool pairs) {
  return w.storage != Storage::kInt8 && pairs && s.integers->stream != nullptr &&
         tokens <= kStreamRows;
}

const float* code_sums(const Context::Scratch& s, const QuantisedItem& i, ThreadScratch& thread) {
  const IntegerKernels& integers = *s.integers;
  const PackedLinear& w = i.w;
  const bool pairs = i.inputs.pairs;
  const Codes codes = codes_of(w.storage);
  if (streams(s, w, i.tokens, pairs)) {
    integers.stream({.codes = codes,
                     .x = reinterpret_cast<const uint16_t*>(i.inputs.x),
                     .x_stride = i.inputs.stride / 2,
                     .rows = i.tokens,
                     .x_sums = i.inputs.group_sums,
                     .x_sums_stride = i.inputs.groups,
                     .w = w.data + i.panels.begin * i.panel_bytes,
                     .panel_stride = i.panel_bytes,
                     .panels = i.panels.size(),
                     .k = w.k,
                     .group = w.group,
                     .c = thread.totals,
                     .c_stride = i.sum_stride,
                     .next = i.next});
    return thread.totals;
  }
  // Codes become bf16 (or f16 for inputs of f32) in the cache, and then the float kernel's weights.
  const auto call = pairs || w.dtype == DType::kBF16 ? s.multiply_codes : s.kernels->multiply_f16;
  const bool as_pairs = w.dtype == DType::kBF16;
  const int64_t x_bytes = pairs ? 2 : 4;
  for (int64_t g = 0; g < i.inputs.groups; ++g) {
    const PackedGroup group = packed_group(w, i.panels.begin, g);
    for (int64_t k = group.k_begin; k < group.k_end; k += kExpandK) {
      const int64_t count = std::min(kExpandK, group.k_end - k);
      const int64_t stride = (count + count % 2) * kPanel * 2;
      for (int64_t p = 0; p < i.panels.size(); ++p)
        integers.expand(codes,
                        group.codes + p * i.panel_bytes + code_bytes(w.storage, k - group.k_begin),
                        count, as_pairs, thread.expanded + p * stride);
      call({.x = i.inputs.x + k * x_bytes,
            .x_stride = i.inputs.stride / x_bytes,
            .rows = i.tokens,
            .w = thread.expanded,
            .panel_stride = stride,
            .panels = i.panels.size(),
            .k = count,
            .c = thread.sums,
            .c_stride = i.sum_stride,
            .accumulate = k > group.k_begin});
    }
    integers.apply(thread.totals, thread.sums, i.sum_stride, i.tokens, i.panels.size(),
                   reinterpret_cast<const std::byte*>(group.scale), i.panel_bytes,
                   w.zeros ? i.inputs.group_sums + g : nullptr, i.inputs.groups, g == 0);
  }
  return thread.totals;
}

// finish(sums, stride of their rows, panels, tokens): the epilogue of one item.
template <typename Finish>
void multiply(Context& ctx, const MatrixView& x, const PackedLinear& w, Finish finish) {
  Context::Scratch& scratch = ctx.scratch();
  ThreadPool& pool = ctx.pool();
  if (x.rows == 0 || w.rows == 0) return;
  const int64_t bytes = quantised_panel_bytes(w.storage, w.k, w.group, w.zeros);
  const int64_t panels = panels_of(w.rows);
  const int64_t threads = pool.size();
  int64_t unit = widest_item(scratch, x, w);
  while (threads > 1 && unit > 2 && panels < 4 * unit * threads) unit /= 2;
  const int64_t count = (panels + unit - 1) / unit;
  const auto panels_of_item = [&](int64_t item) {
    return Range{item * unit, std::min((item + 1) * unit, panels)};
  };
  for (int64_t t = 0; t < x.rows; t += kTokenBlock) {
    const Range tokens{t, std::min(t + kTokenBlock, x.rows)};
    const MatrixView block = x.rows_of(t, tokens.size());
    const QuantisedInputs inputs = place_inputs(scratch, block, w, 0);
    if (!inputs.ready())
      pool.for_each(block.rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, w.k)),
                    [&](int64_t row) { prepare_input(scratch, block, w, inputs, row); });
    scratch.next_item.store(0, std::memory_order_relaxed);
    pool.run([&](int number) {
      ThreadScratch& thread = scratch.threads[static_cast<size_t>(number)];
      for (Range now = take_run(scratch.next_item, count, threads); now.size() > 0;
           now = take_run(scratch.next_item, count, threads)) {
        for (int64_t item = now.begin; item < now.end; ++item) {
          const int64_t next = item + 1 < now.end ? item + 1 : item;
          const QuantisedItem i{.w = w,
                                .inputs = inputs,
                                .tokens = tokens.size(),
                                .panel_bytes = bytes,
                                .panels = panels_of_item(item),
                                .next = w.data + next * unit * bytes,
                                .sum_stride = std::max(unit, kGroupPanels) * kPanel};
          const float* sums = multiply_quantised(scratch, i, thread);
          finish(sums, i.sum_stride, i.panels, tokens);
        }
      }
    });
  }
}

void any_linear(Context& ctx, const MatrixView& x, const PackedLinear& w, const float* bias,
                const MatrixView& out) {
  if (w.storage == Storage::kFloat)
    cpu::linear(ctx, x, w, bias, out);
  else
    linear_quantised(ctx, x, w, bias, out);
}

void gated_halves(Context& ctx, const MatrixView& x, const PackedGated& w, const float* gate_bias,
                  const float* up_bias, const MatrixView& out) {
  Context::Scratch& scratch = ctx.scratch();
  const Kernels& kernels = *scratch.kernels;
  const bool bf16 = out.dtype == DType::kBF16;
  const auto bytes = static_cast<int64_t>(tensor::dtype_bytes(out.dtype));
  for (int64_t t = 0; t < x.rows; t += kHalvesTokens) {
    const int64_t count = std::min(kHalvesTokens, x.rows - t);
    const MatrixView gate{scratch.halves, DType::kF32, count, w.rows, 2 * w.rows};
    const MatrixView up{scratch.halves + w.rows, DType::kF32, count, w.rows, 2 * w.rows};
    any_linear(ctx, x.rows_of(t, count), w.halves[0], gate_bias, gate);
    any_linear(ctx, x.rows_of(t, count), w.halves[1], up_bias, up);
    ctx.pool().for_each(count, 1, [&](int64_t m) {
      alignas(64) float both[32] = {};
      for (int64_t n = 0; n < w.rows; n += kPanel) {
        const int64_t cols = std::min(kPanel, w.rows - n);
        std::memcpy(both, gate.row<float>(m) + n, static_cast<size_t>(cols) * sizeof(float));
        std::memcpy(both + kPanel, up.row<float>(m) + n, static_cast<size_t>(cols) * sizeof(float));
        kernels.finish_gated(both, 2 * kPanel, 1, cols, nullptr, nullptr,
                             out.row<std::byte>(0) + ((t + m) * out.stride + n) * bytes, out.stride,
                             bf16);
      }
    });
  }
}

}  // namespace

int64_t widest_item(const Context::Scratch& s, const MatrixView& x, const PackedLinear& w) {
  const bool pairs = x.dtype == DType::kBF16 && s.kernels->pairs;
  return x.rows <= kWideRows && (w.storage == Storage::kInt8 || streams(s, w, x.rows, pairs))
             ? kWidePanels
             : kGroupPanels;
}

QuantisedInputs place_inputs(const Context::Scratch& s, const MatrixView& x, const PackedLinear& w,
                             int64_t place) {
  PHALANX_CHECK(s.prepared != nullptr && w.k <= s.max_k);
  PHALANX_CHECK(place + x.rows <= std::min(kTokenBlock, s.max_tokens));
  const bool bf16 = x.dtype == DType::kBF16;
  QuantisedInputs in{.x = static_cast<const std::byte*>(x.data),
                     .stride = x.stride * static_cast<int64_t>(tensor::dtype_bytes(x.dtype)),
                     .pairs = bf16 && s.kernels->pairs};
  const auto own = [&](int64_t stride) {
    in.x = in.own = s.prepared + place * s.prepared_stride;
    in.stride = stride;
  };
  if (w.storage == Storage::kInt8) {
    PHALANX_CHECK(w.order == nullptr);
    own((w.k + 63) / 64 * 64);
    in.token_scale = s.token_scale + place;
    in.token_sum = s.token_sum + place;
    return in;
  }
  in.groups = (w.k + w.group - 1) / w.group;
  if (w.zeros) in.group_sums = s.group_sums + place * (s.max_k / kLeastGroup + 1);
  if ((bf16 && !in.pairs) || w.order != nullptr || (in.pairs && w.k % 8 != 0))
    own((w.k + 15) / 16 * 16 * (in.pairs ? 2 : 4));
  return in;
}

void prepare_input(const Context::Scratch& s, const MatrixView& x, const PackedLinear& w,
                   const QuantisedInputs& in, int64_t t) {
  const bool bf16 = x.dtype == DType::kBF16;
  if (w.storage == Storage::kInt8) {
    const auto bytes = static_cast<int64_t>(tensor::dtype_bytes(x.dtype));
    s.integers->quantise(x.row<const std::byte>(0) + t * x.stride * bytes, bf16, w.input, w.k,
                         reinterpret_cast<int8_t*>(in.own + t * in.stride), in.token_scale + t,
                         in.token_sum + t);
    return;
  }
  if (in.own != nullptr) reorder(x, t, w, bf16 && !in.pairs, in.own + t * in.stride);
  if (w.zeros)
    s.integers->sum_groups(in.x + t * in.stride, in.pairs, w.k, w.group,
                           in.group_sums + t * in.groups);
}

const float* multiply_quantised(const Context::Scratch& scratch, const QuantisedItem& item,
                                ThreadScratch& thread) {
  return item.w.storage == Storage::kInt8 ? int8_sums(scratch, item, thread)
                                          : code_sums(scratch, item, thread);
}

void linear_quantised(Context& ctx, const MatrixView& x, const PackedLinear& w, const float* bias,
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

void gated_quantised(Context& ctx, const MatrixView& x, const PackedGated& w,
                     const float* gate_bias, const float* up_bias, const MatrixView& out) {
  if (!w.halves.empty()) return gated_halves(ctx, x, w, gate_bias, up_bias, out);
  const Kernels& kernels = *ctx.scratch().kernels;
  const bool bf16 = out.dtype == DType::kBF16;
  const auto bytes = static_cast<int64_t>(tensor::dtype_bytes(out.dtype));
  multiply(ctx, x, w.panels, [&](const float* sums, int64_t stride, Range panels, Range tokens) {
    const int64_t n = panels.begin / 2 * kPanel;
    const int64_t cols = std::min(panels.end / 2 * kPanel, w.rows) - n;
    kernels.finish_gated(sums, stride, tokens.size(), cols,
                         gate_bias != nullptr ? gate_bias + n : nullptr,
                         up_bias != nullptr ? up_bias + n : nullptr,
                         out.row<std::byte>(0) + (tokens.begin * out.stride + n) * bytes,
                         out.stride, bf16);
  });
}

}  // namespace phalanx::ops::cpu
