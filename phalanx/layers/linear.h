#pragma once

#include <span>
#include <string>

#include "phalanx/layers/cut_columns.h"
#include "phalanx/layers/lora.h"
#include "phalanx/layers/weight_plan.h"

namespace phalanx::layers {

// A linear layer cut by output rows: this rank computes its own, then the outputs are gathered.
class ShardedLinear {
 public:
  struct Shape {
    std::string name;  // without ".weight"
    int64_t rows = 0;
    int64_t k = 0;
    bool bias = false;
  };
  // cut: rows of each rank. act: of the output.
  ShardedLinear(WeightPlan& plan, const Shape& shape, std::span<const Range> cut, DType act,
                int rank);
  // x: [T, k] whole. out: [T, rows] without gaps, whole on return on every rank. pair: of the
  // adapters at `lora` what is added to this layer.
  void forward(ops::Context& ctx, comm::Group& group, const MatrixView& x, const MatrixView& out,
               const LoraSite& lora, LoraPair LoraLayer::* pair) const;

 private:
  ops::PackedLinear weight_;
  const float* bias_ = nullptr;
  CutColumns columns_;
};

// down(silu(gate(x)) * up(x)), each cut by output rows, the activation gathered in between.
class GatedMlp {
 public:
  struct Shape {
    std::string name;  // "model.layers.3.mlp"
    int64_t hidden = 0;
    int64_t intermediate = 0;
    bool bias = false;
  };
  GatedMlp(WeightPlan& plan, const Shape& shape, std::span<const Range> mlp_cut,
           std::span<const Range> hidden_cut, DType act, int rank);
  // x: [T, hidden]; activation: [T, intermediate], overwritten; out: [T, hidden].
  void forward(ops::Context& ctx, comm::Group& group, const MatrixView& x,
               const MatrixView& activation, const MatrixView& out, const LoraSite& lora) const;

 private:
  ops::PackedGated gate_up_;
  const float* gate_bias_ = nullptr;
  const float* up_bias_ = nullptr;
  CutColumns columns_;
  ShardedLinear down_;
};

}  // namespace phalanx::layers
