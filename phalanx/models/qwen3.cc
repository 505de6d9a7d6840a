#include "phalanx/models/registry.h"

namespace phalanx::models {

// Every head of q and k is normed.
DecoderConfig read_qwen3(const ConfigReader& config) {
  DecoderConfig result = read_decoder(config, {.head_dim = 128});
  result.info.qkv_bias = config.boolean("attention_bias", false);
  result.info.output_bias = result.info.qkv_bias;
  result.info.qk_norm = true;
  read_qwen_windows(config, result);
  return result;
}

}  // namespace phalanx::models
