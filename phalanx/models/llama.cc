#include "phalanx/models/registry.h"

namespace phalanx::models {

// LLaMA 2, 3, 3.1 and look-alikes.
DecoderConfig read_llama(const ConfigReader& config) {
  DecoderConfig result = read_decoder(config);
  const bool attention_bias = config.boolean("attention_bias", false);
  result.info.qkv_bias = attention_bias;
  result.info.output_bias = attention_bias;
  result.info.mlp_bias = config.boolean("mlp_bias", false);
  return result;
}

}  // namespace phalanx::models
