#include <algorithm>
#include <array>

#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/cpu/kernels.h"
#include "phalanx/ops/cpu/linear_quantised.h"
#include "phalanx/ops/cpu/runs.h"
#include "phalanx/ops/packing.h"
#include "phalanx/ops/quantised.h"
#include "phalanx/ops/scratch.h"

namespace phalanx::ops::cpu {
namespace {

using tensor::Range;
constexpr int64_t kPanel = tensor::kPanelRows;
// Layers whose items are handed out together.
constexpr size_t kLayers = 128;

bool is_float(const PackedLinear& w) { return w.storage == quant::Storage::kFloat; }

// A layer cut into items of `unit` panels by a block of its rows, all rows of a unit in a row.
struct Cut {
  const GroupedLinear* layer = nullptr;
  int64_t panels = 0;
  int64_t panel_bytes = 0;
  int64_t unit = kGroupPanels;
  int64_t blocks = 1;
  int64_t first = 0;  // number of its first item
  QuantisedInputs inputs;

  [[nodiscard]] int64_t items() const { return (panels + unit - 1) / unit * blocks; }
  [[nodiscard]] Range panels_of(int64_t item) const {
    const int64_t begin = (item - first) / blocks * unit;
    return {begin, std::min(begin + unit, panels)};
  }
  [[nodiscard]] Range rows_of(int64_t item) const {
    const int64_t block = (item - first) % blocks;
    const int64_t rows = layer->rows.size();
    return {layer->rows.begin + rows * block / blocks,
            layer->rows.begin + rows * (block + 1) / blocks};
  }
  [[nodiscard]] int64_t sum_stride() const { return std::max(unit, kGroupPanels) * kPanel; }
  [[nodiscard]] const std::byte* weights_of(int64_t item) const {
    return layer->w->data + panels_of(item).begin * panel_bytes;
  }
};

// Layers that are all float of one type or all quantised, and whose rows fit the scratch.
class Wave {
 public:
  Wave(Context& ctx, const MatrixView& x, const MatrixView& out, bool gated)
      : ctx_(ctx),
        scratch_(ctx.scratch()),
        kernels_(*scratch_.kernels),
        threads_(ctx.pool().size()),
        x_(x),
        out_(out),
        gated_(gated) {}

  // False: not with those before it.
  bool add(const GroupedLinear& layer) {
    const PackedLinear& w = *layer.w;
    if (layer.rows.size() == 0 || w.rows == 0) return true;
    const int64_t most =
        is_float(w) ? scratch_.max_tokens : std::min(kTokenBlock, scratch_.max_tokens);
    if (count_ == kLayers) return false;
    if (count_ > 0 && (is_float(w) != is_float(*cuts_[0].layer->w) ||
                       (is_float(w) && w.dtype != cuts_[0].layer->w->dtype) ||
                       layer.rows.end - cuts_[0].layer->rows.begin > most))
      return false;
    Cut& cut = cuts_[count_++];
    cut = {.layer = &layer, .panels = ops::panels_of(w.rows)};
    if (is_float(w)) {
      cut.panel_bytes = panel_bytes(w.k, w.dtype);
      if (layer.rows.size() <= kWideRows) cut.unit = kWidePanels;
    } else {
      cut.panel_bytes = quantised_panel_bytes(w.storage, w.k, w.group, w.zeros);
      cut.unit = widest_item(scratch_, x_.rows_of(layer.rows.begin, layer.rows.size()), w);
    }
    return true;
  }

  void run() {
    if (count_ == 0) return;
    const int64_t items = cut();
    is_float(*cuts_[0].layer->w) ? prepare_float() : prepare_quantised();
    scratch_.next_item.store(0, std::memory_order_relaxed);
    ctx_.pool().run([&](int thread) {
      ThreadScratch& t = scratch_.threads[static_cast<size_t>(thread)];
      Range now = take_run(scratch_.next_item, items, threads_);
      while (now.size() > 0) {
        const Range then = take_run(scratch_.next_item, items, threads_);
        for (int64_t item = now.begin; item < now.end; ++item) {
          const int64_t next = item + 1 < now.end ? item + 1 : then.size() > 0 ? then.begin : item;
          run_item(t, find(item), item, find(next).weights_of(next));
        }
        now = then;
      }
    });
    count_ = 0;
  }

 private:
  std::span<Cut> cuts() { return {cuts_.data(), count_}; }

  [[nodiscard]] const Cut& find(int64_t item) const {
    const Cut* end = cuts_.data() + count_;
    return *(std::upper_bound(cuts_.data(), end, item,
                              [](int64_t i, const Cut& cut) { return i < cut.first; }) -
             1);
  }

  int64_t number_items() {
    int64_t items = 0;
    for (Cut& cut : cuts()) {
      cut.first = items;
      items += cut.items();
    }
    return items;
  }

  // Units as wide as the kernels take them and blocks as tall as the scratch, unless threads would
  // be left without work.
  int64_t cut() {
    for (Cut& c : cuts()) c.blocks = (c.layer->rows.size() + kTokenBlock - 1) / kTokenBlock;
    const int64_t enough = threads_ > 1 ? 8 * threads_ : 0;
    int64_t items = number_items();
    if (items < enough && is_float(*cuts_[0].layer->w)) {
      for (Cut& c : cuts()) {
        const int64_t most = std::max<int64_t>(1, c.layer->rows.size() / (8 * kTileRows));
        c.blocks = std::clamp((enough + items - 1) / items * c.blocks, c.blocks,
                              std::max(c.blocks, most));
      }
      items = number_items();
    }
    for (int64_t most = kWidePanels / 2; items < enough && most >= 2; most /= 2) {
      for (Cut& c : cuts()) c.unit = std::min(c.unit, most);
      items = number_items();
    }
    return items;
  }

  void prepare_float() {
    const PackedLinear& w = *cuts_[0].layer->w;
    pairs_ = w.dtype == DType::kBF16 && kernels_.pairs;
    multiply_ = w.dtype == DType::kBF16  ? kernels_.multiply_bf16
                : w.dtype == DType::kF16 ? kernels_.multiply_f16
                                         : kernels_.multiply_f32;
    const int64_t begin = cuts_[0].layer->rows.begin;
    input_ = x_.row<const std::byte>(0) + begin * x_.stride * (pairs_ ? 2 : 4);
    stride_ = x_.stride;
    if (w.dtype != DType::kBF16 || pairs_) return;
    const int64_t rows = cuts_[count_ - 1].layer->rows.end - begin;
    PHALANX_CHECK(rows <= scratch_.max_tokens && x_.cols <= scratch_.max_k);
    ctx_.pool().for_each(rows, grain(65536), [&](int64_t i) {
      kernels_.convert(x_.row<const uint16_t>(begin + i), true, x_.cols,
                       scratch_.widened + i * x_.cols, false);
    });
    stride_ = x_.cols;
    input_ = reinterpret_cast<const std::byte*>(scratch_.widened);
  }

  void prepare_quantised() {
    const int64_t begin = cuts_[0].layer->rows.begin;
    bool ready = true;
    for (Cut& c : cuts()) {
      c.inputs = place_inputs(scratch_, x_.rows_of(c.layer->rows.begin, c.layer->rows.size()),
                              *c.layer->w, c.layer->rows.begin - begin);
      ready = ready && c.inputs.ready();
    }
    if (ready) return;
    const int64_t rows = cuts_[count_ - 1].layer->rows.end - begin;
    ctx_.pool().for_each(rows, grain(16384), [&](int64_t i) {
      const Cut* c = cuts_.data();
      while (c->layer->rows.end <= begin + i) ++c;
      if (c->inputs.ready()) return;
      const Range own = c->layer->rows;
      prepare_input(scratch_, x_.rows_of(own.begin, own.size()), *c->layer->w, c->inputs,
                    begin + i - own.begin);
    });
  }

  [[nodiscard]] int64_t grain(int64_t elements) const {
    return std::max<int64_t>(1, elements / std::max<int64_t>(1, x_.cols));
  }

  void run_item(ThreadScratch& t, const Cut& c, int64_t item, const std::byte* next) const {
    const GroupedLinear& layer = *c.layer;
    const Range panels = c.panels_of(item);
    const Range rows = c.rows_of(item);
    const float* sums = t.sums;
    if (is_float(*layer.w))
      multiply_float(t, c, panels, rows, next);
    else
      sums = multiply_quantised(scratch_,
                                {.w = *layer.w,
                                 .inputs = c.inputs,
                                 .tokens = rows.size(),
                                 .panel_bytes = c.panel_bytes,
                                 .panels = panels,
                                 .next = next,
                                 .sum_stride = c.sum_stride()},
                                t);
    const int64_t n = (gated_ ? panels.begin / 2 : panels.begin) * kPanel;
    const int64_t cols = std::min((gated_ ? panels.end / 2 : panels.end) * kPanel, layer.outputs) - n;
    const bool bf16 = out_.dtype == DType::kBF16;
    std::byte* to = out_.row<std::byte>(0) +
                    (rows.begin * out_.stride + n) *
                        static_cast<int64_t>(tensor::dtype_bytes(out_.dtype));
    const float* bias = layer.bias != nullptr ? layer.bias + n : nullptr;
    if (gated_)
      kernels_.finish_gated(sums, c.sum_stride(), rows.size(), cols, bias,
                            layer.up_bias != nullptr ? layer.up_bias + n : nullptr, to, out_.stride,
                            bf16);
    else
      kernels_.finish(sums, c.sum_stride(), rows.size(), cols, bias, to, out_.stride, bf16);
  }

  // As cpu::linear: k in pieces that stay in the caches, where the weights pass by more than once.
  void multiply_float(ThreadScratch& t, const Cut& c, Range panels, Range rows,
                      const std::byte* next) const {
    const PackedLinear& w = *c.layer->w;
    const int64_t first = cuts_[0].layer->rows.begin;
    const int64_t x_bytes = pairs_ ? 2 : 4;
    const int64_t bytes_per_k = kPanel * static_cast<int64_t>(tensor::dtype_bytes(w.dtype));
    const std::byte* weights = w.data + panels.begin * c.panel_bytes;
    const bool widens =
        kernels_.narrow && w.dtype != DType::kF32 && c.layer->rows.size() > 2 * kTileRows;
    const int64_t step = c.layer->rows.size() <= kTileRows ? w.k
                         : widens                          ? kWidenK
                         : pairs_                          ? 2048
                                                           : 1024;
    for (int64_t k = 0; k < w.k; k += step) {
      const int64_t count = std::min(step, w.k - k);
      Product product{.x = input_ + ((rows.begin - first) * stride_ + k) * x_bytes,
                      .x_stride = stride_,
                      .rows = rows.size(),
                      .w = weights + k * bytes_per_k,
                      .panel_stride = c.panel_bytes,
                      .panels = panels.size(),
                      .k = count,
                      .c = t.sums,
                      .c_stride = c.sum_stride(),
                      .accumulate = k > 0};
      if (widens) {
        const int64_t padded = count + count % 2;
        const auto widen = w.dtype == DType::kBF16 ? kernels_.widen_bf16 : kernels_.widen_f16;
        for (int64_t p = 0; p < panels.size(); ++p)
          widen(product.w + p * c.panel_bytes, padded, t.widened + p * padded * kPanel);
        product.w = reinterpret_cast<const std::byte*>(t.widened);
        product.panel_stride = padded * kPanel * static_cast<int64_t>(sizeof(float));
        kernels_.multiply_f32(product);
      } else {
        product.next = k + step >= w.k ? next : product.w + step * bytes_per_k;
        multiply_(product);
      }
    }
  }

  Context& ctx_;
  Context::Scratch& scratch_;
  const Kernels& kernels_;
  const int64_t threads_;
  const MatrixView& x_;
  const MatrixView& out_;
  const bool gated_;
  std::array<Cut, kLayers> cuts_;
  size_t count_ = 0;
  // Of float weights:
  void (*multiply_)(const Product&) = nullptr;
  bool pairs_ = false;
  const std::byte* input_ = nullptr;  // of the first row of the wave
  int64_t stride_ = 0;
};

}  // namespace

void linear_grouped(Context& ctx, const MatrixView& x, std::span<const GroupedLinear> layers,
                    bool gated, const MatrixView& out) {
  Wave wave(ctx, x, out, gated);
  for (const GroupedLinear& layer : layers) {
    if (wave.add(layer)) continue;
    wave.run();
    PHALANX_CHECK(wave.add(layer));
  }
  wave.run();
}

}  // namespace phalanx::ops::cpu
