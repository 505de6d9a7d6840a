#pragma once

#include <initializer_list>
#include <span>
#include <vector>

#include "phalanx/layers/memory.h"
#include "phalanx/ops/low_rank.h"

namespace phalanx::layers {

// What one adapter adds to one linear layer: B A x, the scale inside B. Both f32; A whole on every
// rank (it is small, and so its sums need no message), B its own output rows. a.rows 0: nothing.
struct LoraPair {
  ops::PackedLinear a;  // [r, k]
  ops::PackedLinear b;  // [own rows, r]
  [[nodiscard]] bool present() const { return a.rows > 0; }
};

// What it adds to one decoder layer.
struct LoraLayer {
  LoraPair q, k, v, o, gate, up, down;
};

// The memory of a step's adapters.
struct LoraScratch {
  struct Shape {
    int64_t max_k = 0;        // of the layers that can be adapted
    int64_t max_rank = 0;
    int64_t gated_rows = 0;   // own rows of gate and up
    bool halves = false;      // gate and up may be of two formats
  };
  LoraScratch(Carver& carver, const Shape& shape);
  ops::LowRankScratch low_rank;
  tensor::MatrixView sums;  // f32 [kGatedSumRows, 2 * gated_rows rounded up to 16]
  tensor::MatrixView half;  // f32 [kGatedSumRows, gated_rows], or nothing
};

// The rows of one matrix that use adapters.
class LoraRows {
 public:
  struct Use {
    std::span<const LoraLayer> layers;  // lent
    std::vector<int32_t> rows;          // ascending
  };
  [[nodiscard]] bool empty() const { return uses_.empty(); }
  [[nodiscard]] std::span<const Use> uses() const { return uses_; }
  void clear();
  // Rows [begin, begin + count), after those that were added before, use the adapter with `layers`.
  void add(std::span<const LoraLayer> layers, int64_t begin, int64_t count);

 private:
  std::vector<Use> uses_;
  std::vector<std::vector<int32_t>> spare_;  // so that a step allocates nothing once grown
};

// How a layer of the model reaches the adapters of a step; null rows: base alone.
class LoraSite {
 public:
  LoraSite() = default;
  LoraSite(const LoraRows& rows, size_t layer, const LoraScratch& scratch)
      : rows_(rows.empty() ? nullptr : &rows), layer_(layer), scratch_(&scratch) {}

  struct Target {
    LoraPair LoraLayer::* pair;
    tensor::MatrixView out;  // own columns
  };
  // out += B A x on the rows that use an adapter.
  void add(ops::Context& ctx, const tensor::MatrixView& x,
           std::initializer_list<Target> targets) const;
  // As ops::gated_linear, with what adapters add to gate and up.
  void gated_linear(ops::Context& ctx, const tensor::MatrixView& x, const ops::PackedGated& w,
                    const float* gate_bias, const float* up_bias,
                    const tensor::MatrixView& out) const;

 private:
  [[nodiscard]] bool adapts_gate() const;

  const LoraRows* rows_ = nullptr;
  size_t layer_ = 0;
  const LoraScratch* scratch_ = nullptr;
};

}  // namespace phalanx::layers
