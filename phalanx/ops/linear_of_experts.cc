#include <array>

#include "phalanx/base/check.h"
#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/moe.h"
#include "phalanx/ops/scratch.h"

namespace phalanx::ops {
namespace {

// Collects the layers that the grouped kernels take, and runs them.
class Group {
 public:
  Group(Context& ctx, const MatrixView& x, bool gated, const MatrixView& out)
      : ctx_(ctx), x_(x), gated_(gated), out_(out) {}

  // False: not one of these layers.
  bool add(const PackedLinear& w, const cpu::GroupedLinear& layer) {
    if (ctx_.scratch().kernels == nullptr || !w.parts.empty()) return false;
    if (w.storage != quant::Storage::kFloat && layer.rows.size() > kTokenBlock) return false;
    PHALANX_CHECK(x_.cols == w.k && out_.cols == layer.outputs);
    PHALANX_CHECK(x_.dtype == (w.dtype == DType::kBF16 ? DType::kBF16 : DType::kF32));
    PHALANX_CHECK(out_.dtype == DType::kBF16 || out_.dtype == DType::kF32);
    PHALANX_CHECK(layer.rows.begin >= 0 && layer.rows.end <= x_.rows && x_.rows == out_.rows);
    ctx_.observe(x_.rows_of(layer.rows.begin, layer.rows.size()));
    if (count_ == layers_.size()) run();
    layers_[count_++] = layer;
    return true;
  }
  void run() {
    if (count_ > 0) cpu::linear_grouped(ctx_, x_, std::span(layers_).first(count_), gated_, out_);
    count_ = 0;
  }

 private:
  Context& ctx_;
  const MatrixView& x_;
  bool gated_;
  const MatrixView& out_;
  std::array<cpu::GroupedLinear, 128> layers_;
  size_t count_ = 0;
};

}  // namespace

void linear_of_experts(Context& ctx, const MatrixView& x, std::span<const ExpertLinear> experts,
                       const MatrixView& out) {
  Group group(ctx, x, false, out);
  for (const ExpertLinear& e : experts) {
    const int64_t rows = e.rows.size();
    if (rows == 0 ||
        group.add(*e.w, {.w = e.w, .outputs = e.w->rows, .bias = e.w->own_bias, .rows = e.rows}))
      continue;
    group.run();
    linear(ctx, x.rows_of(e.rows.begin, rows), *e.w, nullptr, out.rows_of(e.rows.begin, rows));
  }
  group.run();
}

void gated_linear_of_experts(Context& ctx, const MatrixView& x,
                             std::span<const ExpertGated> experts, const MatrixView& out) {
  Group group(ctx, x, true, out);
  for (const ExpertGated& e : experts) {
    const int64_t rows = e.rows.size();
    if (rows == 0 || (e.w->halves.empty() && group.add(e.w->panels, {.w = &e.w->panels,
                                                                     .outputs = e.w->rows,
                                                                     .bias = e.w->own_gate_bias,
                                                                     .up_bias = e.w->own_up_bias,
                                                                     .rows = e.rows})))
      continue;
    group.run();
    gated_linear(ctx, x.rows_of(e.rows.begin, rows), *e.w, nullptr, nullptr,
                 out.rows_of(e.rows.begin, rows));
  }
  group.run();
}

}  // namespace phalanx::ops
