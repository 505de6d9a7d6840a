#include "phalanx/models/registry.h"

namespace phalanx::models {

DecoderConfig read_mistral(const ConfigReader& config) {
  DecoderConfig result = read_decoder(config);
  set_window(result, config.integer("sliding_window", 1, kMaxPositions, 0));
  return result;
}

}  // namespace phalanx::models
