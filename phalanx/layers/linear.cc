#include "phalanx/layers/linear.h"

namespace phalanx::layers {

ShardedLinear::ShardedLinear(WeightPlan& plan, const Shape& shape, std::span<const Range> cut,
                             DType act, int rank)
    : columns_(cut, 1, act, rank) {
  const Range take = cut[static_cast<size_t>(rank)];
  weight_ = plan.linear({{shape.name + ".weight", shape.rows, shape.k, take}});
  if (shape.bias) bias_ = plan.vector({{shape.name + ".bias", shape.rows, 0, take}});
}

void ShardedLinear::forward(ops::Context& ctx, comm::Group& group, const MatrixView& x,
                            const MatrixView& out, const LoraSite& lora,
                            LoraPair LoraLayer::* pair) const {
  if (weight_.rows > 0) {
    ops::linear(ctx, x, weight_, bias_, columns_.own(out));
    lora.add(ctx, x, {{pair, columns_.own(out)}});
  }
  columns_.all_gather(group, out);
}

GatedMlp::GatedMlp(WeightPlan& plan, const Shape& shape, std::span<const Range> mlp_cut,
                   std::span<const Range> hidden_cut, DType act, int rank)
    : columns_(mlp_cut, 1, act, rank),
      down_(plan, {shape.name + ".down_proj", shape.hidden, shape.intermediate, shape.bias},
            hidden_cut, act, rank) {
  const Range take = mlp_cut[static_cast<size_t>(rank)];
  const std::string gate = shape.name + ".gate_proj";
  const std::string up = shape.name + ".up_proj";
  gate_up_ = plan.gated({gate + ".weight", shape.intermediate, shape.hidden, take},
                        {up + ".weight", shape.intermediate, shape.hidden, take});
  if (shape.bias) {
    gate_bias_ = plan.vector({{gate + ".bias", shape.intermediate, 0, take}});
    up_bias_ = plan.vector({{up + ".bias", shape.intermediate, 0, take}});
  }
}

void GatedMlp::forward(ops::Context& ctx, comm::Group& group, const MatrixView& x,
                       const MatrixView& activation, const MatrixView& out,
                       const LoraSite& lora) const {
  if (gate_up_.rows > 0)
    lora.gated_linear(ctx, x, gate_up_, gate_bias_, up_bias_, columns_.own(activation));
  columns_.all_gather(group, activation);
  down_.forward(ctx, group, activation, out, lora, &LoraLayer::down);
}

}  // namespace phalanx::layers
