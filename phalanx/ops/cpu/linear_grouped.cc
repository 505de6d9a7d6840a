#include <algorithm>
#include <array>

#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/cpu/linear_float.h"
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
    const int64_t begin = cuts_[0].layer->rows.begin;
    const int64_t rows = cuts_[count_ - 1].layer->rows.end - begin;
    float_inputs_ = float_inputs(ctx_, x_.rows_of(begin, rows), *cuts_[0].layer->w);
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
    const int64_t first = cuts_[0].layer->rows.begin;
    const float* sums = t.sums;
    if (is_float(*layer.w))
      multiply_float(kernels_,
                     {.w = *layer.w,
                      .inputs = float_inputs_,
                      .tokens = {rows.begin - first, rows.end - first},
                      .all_tokens = layer.rows.size(),
                      .panel_bytes = c.panel_bytes,
                      .panels = panels,
                      .next = next,
                      .sum_stride = c.sum_stride()},
                     t);
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

  Context& ctx_;
  Context::Scratch& scratch_;
  const Kernels& kernels_;
  const int64_t threads_;
  const MatrixView& x_;
  const MatrixView& out_;
  const bool gated_;
  std::array<Cut, kLayers> cuts_;
  size_t count_ = 0;
  FloatInputs float_inputs_;
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
