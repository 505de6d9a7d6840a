#include "phalanx/models/registry.h"

namespace phalanx::models {

// ERNIE 4.5 without experts. Neighbouring values rotate together.
DecoderConfig read_ernie4_5(const ConfigReader& config) {
  DecoderConfig result = read_decoder(config, {.head_dim = 128,
                                               .rope_theta = 500000.0,
                                               .rms_norm_eps = 1e-5,
                                               .tied_embeddings = true});
  const bool bias = config.boolean("use_bias", false);
  result.info.qkv_bias = bias;
  result.info.output_bias = bias;
  result.info.mlp_bias = bias;
  result.rotary.interleaved = true;
  return result;
}

}  // namespace phalanx::models
