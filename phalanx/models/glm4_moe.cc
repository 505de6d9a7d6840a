#include "phalanx/models/registry.h"

namespace phalanx::models {

// GLM-4.5: half of each head rotates; sigmoid scores with a correction of the choice.
DecoderConfig read_glm4_moe(const ConfigReader& config) {
  DecoderConfig result =
      read_decoder(config, {.partial_rotary_factor = 0.5, .rms_norm_eps = 1e-5});
  result.info.qkv_bias = config.boolean("attention_bias", false);
  result.info.qk_norm = config.boolean("use_qk_norm", false);
  read_experts(config, result, "n_routed_experts", "num_experts_per_tok");
  read_dense_before(config, result);
  read_expert_groups(config, result);
  Experts& experts = result.info.experts;
  experts.shared_intermediate_size =
      experts.intermediate_size * config.integer("n_shared_experts", 1, kMaxWidth, 0);
  experts.correction_bias = true;
  result.routing.score = ops::RoutingRule::Score::kSigmoid;
  result.routing.group_score = ops::RoutingRule::GroupScore::kBestTwo;
  result.routing.normalise = config.boolean("norm_topk_prob", true);
  result.routing.scale =
      static_cast<float>(config.number("routed_scaling_factor", 0.0, 1e6, 1.0));
  return result;
}

}  // namespace phalanx::models
