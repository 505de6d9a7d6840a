#include "phalanx/models/registry.h"

namespace phalanx::models {

// MLA; softmax scores, of the best groups where topk_method says so. With norm_topk_prob the weights
// are normalised and not scaled (modeling_deepseek.py of deepseek-ai/DeepSeek-V2).
DecoderConfig read_deepseek_v2(const ConfigReader& config) {
  // The V3 architecture is also published under this name.
  const std::string method = config.text("topk_method", "greedy");
  if (method == "noaux_tc") return read_deepseek_v3(config);
  DecoderConfig result = read_decoder(config);
  read_latent(config, result);
  result.rotary.interleaved = true;
  read_experts(config, result, "n_routed_experts", "num_experts_per_tok");
  read_dense_before(config, result);
  read_shared_experts(config, result);
  if (method == "group_limited_greedy")
    read_expert_groups(config, result);
  else if (method != "greedy")
    config.refuse("topk_method", "unknown choice of experts",
                  "greedy, group_limited_greedy or noaux_tc");
  if (config.text("scoring_func", "softmax") != "softmax")
    config.refuse("scoring_func", "unsupported scores", "softmax");
  result.routing.normalise =
      config.boolean("norm_topk_prob", false) && result.info.experts.per_token > 1;
  const double scale = config.number("routed_scaling_factor", 0.0, 1e6, 1.0);
  result.routing.scale = result.routing.normalise ? 1.0F : static_cast<float>(scale);
  return result;
}

}  // namespace phalanx::models
