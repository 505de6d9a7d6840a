#include "phalanx/models/registry.h"

namespace phalanx::models {

// DeepSeek V3, R1, V3.1 and Kimi K2: MLA; sigmoid scores with a correction of the choice, groups by
// their best two.
DecoderConfig read_deepseek_v3(const ConfigReader& config) {
  DecoderConfig result = read_decoder(config);
  read_latent(config, result);
  result.rotary.interleaved = config.boolean("rope_interleave", true);
  read_experts(config, result, "n_routed_experts", "num_experts_per_tok");
  read_dense_before(config, result);
  read_expert_groups(config, result);
  Experts& experts = result.info.experts;
  experts.shared_intermediate_size =
      experts.intermediate_size * config.integer("n_shared_experts", 1, kMaxWidth, 0);
  experts.correction_bias = true;
  if (config.text("scoring_func", "sigmoid") != "sigmoid")
    config.refuse("scoring_func", "unsupported scores", "sigmoid");
  if (config.text("topk_method", "noaux_tc") != "noaux_tc")
    config.refuse("topk_method", "unknown choice of experts", "noaux_tc");
  result.routing.score = ops::RoutingRule::Score::kSigmoid;
  result.routing.group_score = ops::RoutingRule::GroupScore::kBestTwo;
  result.routing.normalise = config.boolean("norm_topk_prob", true);
  result.routing.scale =
      static_cast<float>(config.number("routed_scaling_factor", 0.0, 1e6, 1.0));
  return result;
}

}  // namespace phalanx::models
