#include "phalanx/models/registry.h"

namespace phalanx::models {

// Softmax over the chosen experts, which is softmax over all, normalised.
DecoderConfig read_mixtral(const ConfigReader& config) {
  DecoderConfig result = read_decoder(config, {.rope_theta = 1e6, .rms_norm_eps = 1e-5});
  set_window(result, config.integer("sliding_window", 1, kMaxPositions, 0));
  Experts& experts = result.info.experts;
  experts.count = config.integer("num_local_experts", 1, ops::kMaxExperts, 8);
  experts.per_token = config.integer("num_experts_per_tok", 1, experts.count, 2);
  experts.intermediate_size = result.info.intermediate_size;
  experts.in_layer.assign(static_cast<size_t>(result.info.num_layers), true);
  experts.block = "block_sparse_moe";
  experts.gate = "w1";
  experts.up = "w3";
  experts.down = "w2";
  result.routing.normalise = true;
  return result;
}

}  // namespace phalanx::models
