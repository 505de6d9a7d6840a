#include "phalanx/layers/lora.h"

#include <algorithm>
#include <array>

#include "phalanx/base/check.h"

namespace phalanx::layers {
namespace {

using ops::LowRankPart;
using tensor::MatrixView;

constexpr int64_t kPanel = tensor::kPanelRows;
constexpr size_t kMostParts = 3;  // that share an input

int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

class Parts {
 public:
  void add(const LoraPair& pair, const MatrixView& out, int64_t panel_stride = kPanel) {
    if (!pair.present() || pair.b.rows == 0) return;
    PHALANX_CHECK(count_ < parts_.size());
    parts_[count_++] = {.a = &pair.a, .b = &pair.b, .out = out, .panel_stride = panel_stride};
  }
  [[nodiscard]] std::span<const LowRankPart> all() const { return {parts_.data(), count_}; }

 private:
  std::array<LowRankPart, kMostParts> parts_;
  size_t count_ = 0;
};

// Those of `rows` in [begin, end), in pieces that one call takes.
template <typename Call>
void for_pieces(std::span<const int32_t> rows, int64_t begin, int64_t end, Call call) {
  const auto from = std::lower_bound(rows.begin(), rows.end(), begin);
  const auto to = std::lower_bound(from, rows.end(), end);
  std::span<const int32_t> rest(from, to);
  while (!rest.empty()) {
    const auto some = std::min<size_t>(rest.size(), ops::kLowRankRows);
    call(rest.first(some));
    rest = rest.subspan(some);
  }
}

}  // namespace

LoraScratch::LoraScratch(Carver& carver, const Shape& shape) {
  const int64_t reduced = static_cast<int64_t>(kMostParts) * padded(shape.max_rank);
  low_rank.max_k = padded(shape.max_k);
  low_rank.reduced_stride = reduced;
  low_rank.inputs = static_cast<float*>(
      carver.matrix(ops::kLowRankRows, low_rank.max_k, tensor::DType::kF32).data);
  low_rank.reduced =
      static_cast<float*>(carver.matrix(ops::kLowRankRows, reduced, tensor::DType::kF32).data);
  sums = carver.matrix(ops::kGatedSumRows, 2 * padded(shape.gated_rows), tensor::DType::kF32);
  half =
      carver.matrix(shape.halves ? ops::kGatedSumRows : 0, shape.gated_rows, tensor::DType::kF32);
}

void LoraRows::clear() {
  for (Use& use : uses_) {
    use.rows.clear();
    spare_.push_back(std::move(use.rows));
  }
  uses_.clear();
}

void LoraRows::add(std::span<const LoraLayer> layers, int64_t begin, int64_t count) {
  if (count == 0) return;
  auto use = std::find_if(uses_.begin(), uses_.end(),
                          [&](const Use& u) { return u.layers.data() == layers.data(); });
  if (use == uses_.end()) {
    std::vector<int32_t> rows;
    if (!spare_.empty()) {
      rows = std::move(spare_.back());
      spare_.pop_back();
    }
    uses_.push_back({.layers = layers, .rows = std::move(rows)});
    use = uses_.end() - 1;
  }
  for (int64_t row = begin; row < begin + count; ++row)
    use->rows.push_back(static_cast<int32_t>(row));
}

void LoraSite::add(ops::Context& ctx, const MatrixView& x,
                   std::initializer_list<Target> targets) const {
  if (rows_ == nullptr) return;
  for (const LoraRows::Use& use : rows_->uses()) {
    const LoraLayer& layer = use.layers[layer_];
    Parts parts;
    for (const Target& target : targets) parts.add(layer.*target.pair, target.out);
    if (parts.all().empty()) continue;
    for_pieces(use.rows, 0, x.rows, [&](std::span<const int32_t> rows) {
      ops::low_rank(ctx, x, rows, 0, parts.all(), scratch_->low_rank);
    });
  }
}

bool LoraSite::adapts_gate() const {
  return rows_ != nullptr &&
         std::any_of(rows_->uses().begin(), rows_->uses().end(), [&](const LoraRows::Use& use) {
           return use.layers[layer_].gate.present() || use.layers[layer_].up.present();
         });
}

void LoraSite::gated_linear(ops::Context& ctx, const MatrixView& x, const ops::PackedGated& w,
                            const float* gate_bias, const float* up_bias,
                            const MatrixView& out) const {
  if (!adapts_gate()) return ops::gated_linear(ctx, x, w, gate_bias, up_bias, out);
  for (int64_t t = 0; t < x.rows; t += ops::kGatedSumRows) {
    const int64_t count = std::min(ops::kGatedSumRows, x.rows - t);
    const MatrixView sums = scratch_->sums.rows_of(0, count);
    const MatrixView half = w.halves.empty() ? MatrixView{} : scratch_->half.rows_of(0, count);
    ops::gated_sums(ctx, x.rows_of(t, count), w, sums, half);
    for (const LoraRows::Use& use : rows_->uses()) {
      const LoraLayer& layer = use.layers[layer_];
      Parts parts;
      parts.add(layer.gate, sums, 2 * kPanel);
      parts.add(layer.up, sums.columns(kPanel, sums.cols - kPanel), 2 * kPanel);
      if (parts.all().empty()) continue;
      for_pieces(use.rows, t, t + count, [&](std::span<const int32_t> rows) {
        ops::low_rank(ctx, x, rows, t, parts.all(), scratch_->low_rank);
      });
    }
    ops::gated_finish(ctx, sums, w, gate_bias, up_bias, out.rows_of(t, count));
  }
}

}  // namespace phalanx::layers
