#include "phalanx/models/registry.h"

namespace phalanx::models {

// GLM-4.5: half of each head rotates; sigmoid scores with a correction of the choice.
DecoderConfig read_glm4_moe(const ConfigReader& config) {
  DecoderConfig result =
      read_decoder(config, {.partial_rotary_factor = 0.5, .rms_norm_eps = 1e-5});
  result.info.qkv_bias = config.boolean("attention_bias", false);
  result.info.qk_norm = config.boolean("use_qk_norm", false);
  read_corrected_experts(config, result);
  return result;
}

}  // namespace phalanx::models
