#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace phalanx::layers {

// How positions become angles.
struct RotaryConfig {
  enum class Type { kDefault, kLinear, kLlama3 };
  Type type = Type::kDefault;
  double theta = 10000.0;
  double factor = 1.0;                            // linear, llama3
  double low_freq_factor = 1.0;                   // llama3
  double high_freq_factor = 4.0;                  // llama3
  int64_t original_max_position_embeddings = 0;   // llama3
};

inline constexpr std::string_view kRotaryTypes = "default, linear, llama3";

// head_dim / 2 angles per position. default: theta^(-2i / head_dim) (RoFormer,
// https://arxiv.org/abs/2104.09864, 3.2.2); linear: divided by factor
// (https://arxiv.org/abs/2306.15595); llama3: long waves divided by factor, short ones kept, those
// between interpolated (apply_scaling in models/llama3/reference_impl/model.py of
// https://github.com/meta-llama/llama-models).
[[nodiscard]] std::vector<double> inverse_frequencies(const RotaryConfig& config, int64_t head_dim);

}  // namespace phalanx::layers
