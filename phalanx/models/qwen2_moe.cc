#include "phalanx/models/registry.h"

namespace phalanx::models {

// A shared expert whose output is weighed by a gate of its own.
DecoderConfig read_qwen2_moe(const ConfigReader& config) {
  DecoderConfig result = read_decoder(config);
  result.info.qkv_bias = config.boolean("qkv_bias", true);
  if (config.boolean("use_sliding_window", false))
    config.refuse("use_sliding_window", "sliding windows are not supported in this family", "false");
  read_experts(config, result, "num_experts", "num_experts_per_tok");
  read_sparse_steps(config, result);
  Experts& experts = result.info.experts;
  experts.shared_intermediate_size =
      config.integer("shared_expert_intermediate_size", 1, kMaxWidth);
  experts.shared = "shared_expert";
  experts.shared_gate = true;
  result.routing.normalise = config.boolean("norm_topk_prob", false);
  return result;
}

}  // namespace phalanx::models
