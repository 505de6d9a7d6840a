#include "phalanx/models/registry.h"

namespace phalanx::models {

// DeepSeek V3, R1, V3.1 and Kimi K2: MLA; sigmoid scores with a correction of the choice, groups by
// their best two.
DecoderConfig read_deepseek_v3(const ConfigReader& config) {
  DecoderConfig result = read_decoder(config);
  read_latent(config, result);
  result.rotary.interleaved = config.boolean("rope_interleave", true);
  read_corrected_experts(config, result);
  if (config.text("scoring_func", "sigmoid") != "sigmoid")
    config.refuse("scoring_func", "unsupported scores", "sigmoid");
  if (config.text("topk_method", "noaux_tc") != "noaux_tc")
    config.refuse("topk_method", "unknown choice of experts", "noaux_tc");
  return result;
}

}  // namespace phalanx::models
