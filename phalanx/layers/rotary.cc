#include "phalanx/layers/rotary.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace phalanx::layers {
namespace {

using Type = RotaryConfig::Type;

float llama3(const RotaryConfig& config, float f) {
  const auto original = static_cast<double>(config.original_max_position_embeddings);
  const double wavelength = 2.0 * std::numbers::pi / f;
  if (wavelength > original / config.low_freq_factor) return static_cast<float>(f / config.factor);
  if (wavelength < original / config.high_freq_factor) return f;
  const double smooth = (original / wavelength - config.low_freq_factor) /
                        (config.high_freq_factor - config.low_freq_factor);
  return static_cast<float>((1.0 - smooth) * f / config.factor + smooth * f);
}

// How much of dimension pair i is interpolated, 0 to 1.
std::vector<float> yarn_ramp(const RotaryConfig& config) {
  const auto dim = static_cast<double>(config.rotary_dim);
  const auto pair_of = [&](double rotations) {
    return dim *
           std::log(static_cast<double>(config.original_max_position_embeddings) /
                    (rotations * 2.0 * std::numbers::pi)) /
           (2.0 * std::log(config.theta));
  };
  double low = pair_of(config.beta_fast);
  double high = pair_of(config.beta_slow);
  if (config.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1.0);
  if (low == high) high += 0.001;
  std::vector<float> ramp;
  for (int64_t i = 0; i < config.rotary_dim / 2; ++i)
    ramp.push_back(static_cast<float>(
        std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0)));
  return ramp;
}

}  // namespace

double yarn_mscale(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

std::vector<float> inverse_frequencies(const RotaryConfig& config, int64_t length) {
  const int64_t dim = config.rotary_dim;
  double theta = config.theta;
  if (config.type == Type::kDynamic) {
    const auto original = static_cast<double>(config.original_max_position_embeddings);
    const double reached = std::max(static_cast<double>(length), original);
    theta *= std::pow(config.factor * reached / original - (config.factor - 1.0),
                      static_cast<double>(dim) / static_cast<double>(dim - 2));
  }
  const std::vector<float> ramp =
      config.type == Type::kYarn ? yarn_ramp(config) : std::vector<float>();
  std::vector<float> frequencies;
  for (int64_t i = 0; i < dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(dim);
    const auto wave = static_cast<float>(std::pow(theta, static_cast<double>(exponent)));
    float f = 1.0F / wave;
    switch (config.type) {
      case Type::kDefault:
      case Type::kDynamic: break;
      case Type::kLinear: f /= static_cast<float>(config.factor); break;
      case Type::kLlama3: f = llama3(config, f); break;
      case Type::kYarn: {
        const float slow = 1.0F / (static_cast<float>(config.factor) * wave);
        const float kept = 1.0F - ramp[static_cast<size_t>(i)];
        f = slow * (1.0F - kept) + f * kept;
      }
    }
    frequencies.push_back(f);
  }
  return frequencies;
}

ops::RopeTable rope_table(const RotaryConfig& config, int64_t positions) {
  const auto scale = static_cast<float>(config.attention_factor);
  const auto at = [&](int64_t length) { return inverse_frequencies(config, length); };
  if (config.type != Type::kDynamic) return ops::make_rope_table(at(0), positions, scale);
  const int64_t same = std::min(positions, config.original_max_position_embeddings);
  ops::RopeTable table = ops::make_rope_table(at(same), same, scale);
  for (int64_t p = same; p < positions; ++p) ops::append_position(table, at(p + 1), scale);
  return table;
}

}  // namespace phalanx::layers
