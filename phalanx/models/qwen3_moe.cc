#include "phalanx/models/registry.h"

namespace phalanx::models {

// Every head of q and k is normed; no shared expert.
DecoderConfig read_qwen3_moe(const ConfigReader& config) {
  DecoderConfig result = read_decoder(config);
  result.info.qkv_bias = config.boolean("attention_bias", false);
  result.info.output_bias = result.info.qkv_bias;
  result.info.qk_norm = true;
  if (config.boolean("use_sliding_window", false))
    set_window(result, config.integer("sliding_window", 1, kMaxPositions, 4096));
  read_experts(config, result, "num_experts", "num_experts_per_tok");
  read_sparse_steps(config, result);
  result.routing.normalise = config.boolean("norm_topk_prob", false);
  return result;
}

}  // namespace phalanx::models
