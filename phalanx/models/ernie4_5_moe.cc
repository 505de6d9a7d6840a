#include "phalanx/models/registry.h"

namespace phalanx::models {

// Softmax scores with a correction of the choice; neighbouring values rotate together.
DecoderConfig read_ernie4_5_moe(const ConfigReader& config) {
  DecoderConfig result = read_decoder(
      config, {.rope_theta = 500000.0, .rms_norm_eps = 1e-5, .tied_embeddings = true});
  const bool bias = config.boolean("use_bias", false);
  result.info.qkv_bias = bias;
  result.info.output_bias = bias;
  result.info.mlp_bias = bias;
  result.info.head_bias = bias;
  result.rotary.interleaved = true;
  read_experts(config, result, "moe_num_experts", "moe_k");
  Experts& experts = result.info.experts;
  const int64_t layers = result.info.num_layers;
  const int64_t first = config.integer("moe_layer_start_index", 0, kMaxPositions, 1);
  const int64_t last = config.integer("moe_layer_end_index", -1, kMaxPositions, -1);
  const int64_t step = config.integer("moe_layer_interval", 1, kMaxPositions, 1);
  for (int64_t i = 0; i < layers; ++i)
    experts.in_layer[static_cast<size_t>(i)] =
        (i + 1) % step == 0 && i >= first && (last == -1 || i <= last);
  experts.shared_intermediate_size =
      experts.intermediate_size * config.integer("moe_num_shared_experts", 0, kMaxWidth, 0);
  experts.correction_bias = true;
  experts.correction = "moe_statics.e_score_correction_bias";
  result.routing.normalise = true;
  result.routing.least_sum = static_cast<float>(config.number("moe_norm_min", 0.0, 1.0, 1e-12));
  return result;
}

}  // namespace phalanx::models
