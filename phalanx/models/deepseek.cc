#include "phalanx/models/registry.h"

namespace phalanx::models {

// DeepSeek-MoE-16B: LLaMA's attention, shared and routed experts, the first layers dense.
DecoderConfig read_deepseek(const ConfigReader& config) {
  DecoderConfig result = read_decoder(config);
  const bool bias = config.boolean("attention_bias", false);
  result.info.qkv_bias = bias;
  result.info.output_bias = bias;
  read_experts(config, result, "n_routed_experts", "num_experts_per_tok");
  read_dense_before(config, result);
  read_shared_experts(config, result);
  if (config.text("scoring_func", "softmax") != "softmax")
    config.refuse("scoring_func", "unsupported scores", "softmax");
  result.routing.normalise =
      config.boolean("norm_topk_prob", false) && result.info.experts.per_token > 1;
  return result;
}

}  // namespace phalanx::models
