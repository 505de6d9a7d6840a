#include "phalanx/models/registry.h"

namespace phalanx::models {

// q, k and v always have biases.
DecoderConfig read_qwen2(const ConfigReader& config) {
  DecoderConfig result = read_decoder(config);
  result.info.qkv_bias = true;
  read_qwen_windows(config, result);
  return result;
}

}  // namespace phalanx::models
