#include "phalanx/layers/rotary.h"

#include <cmath>
#include <numbers>

namespace phalanx::layers {

std::vector<double> inverse_frequencies(const RotaryConfig& config, int64_t head_dim) {
  std::vector<double> frequencies;
  for (int64_t i = 0; i < head_dim; i += 2) {
    double f = std::pow(config.theta, -static_cast<double>(i) / static_cast<double>(head_dim));
    if (config.type == RotaryConfig::Type::kLinear) f /= config.factor;
    if (config.type == RotaryConfig::Type::kLlama3) {
      const auto original = static_cast<double>(config.original_max_position_embeddings);
      const double wavelength = 2.0 * std::numbers::pi / f;
      if (wavelength > original / config.low_freq_factor) {
        f /= config.factor;
      } else if (wavelength >= original / config.high_freq_factor) {
        const double smooth = (original / wavelength - config.low_freq_factor) /
                              (config.high_freq_factor - config.low_freq_factor);
        f = (1.0 - smooth) * f / config.factor + smooth * f;
      }
    }
    frequencies.push_back(f);
  }
  return frequencies;
}

}  // namespace phalanx::layers
