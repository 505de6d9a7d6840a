#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/ops/ops.h"

namespace phalanx::layers {

// How positions become angles.
struct RotaryConfig {
  enum class Type { kDefault, kLinear, kDynamic, kLlama3, kYarn };
  Type type = Type::kDefault;
  double theta = 10000.0;
  double factor = 1.0;                            // all but default
  double low_freq_factor = 1.0;                   // llama3
  double high_freq_factor = 4.0;                  // llama3
  int64_t original_max_position_embeddings = 0;   // dynamic, llama3, yarn
  double beta_fast = 32.0;                        // yarn
  double beta_slow = 1.0;                         // yarn
  bool truncate = true;                           // yarn: whole dimensions as bounds of the ramp
  double attention_factor = 1.0;                  // yarn: times cos and sin
  int64_t rotary_dim = 0;    // leading values of a head that rotate; even
  // Neighbouring values rotate together, not those half a head apart.
  bool interleaved = false;
};

inline constexpr std::string_view kRotaryTypes = "default, linear, dynamic, llama3, yarn";

// yarn's 0.1 * mscale * ln(factor) + 1 (https://arxiv.org/abs/2309.00071, 3.4); 1 below factor 1.
[[nodiscard]] double yarn_mscale(double factor, double mscale);

// rotary_dim / 2 angles per position, each rounded to f32 as transformers rounds them. default:
// theta^(-2i / rotary_dim) (RoFormer, https://arxiv.org/abs/2104.09864, 3.2.2); linear: divided by
// factor (https://arxiv.org/abs/2306.15595); dynamic: a larger theta from the position
// original_max_position_embeddings on (NTK), as at `length`, the number of positions so far; llama3:
// long waves divided by factor, short ones kept, those between interpolated (apply_scaling in
// models/llama3/reference_impl/model.py of https://github.com/meta-llama/llama-models); yarn: the
// same by a ramp over the dimensions (https://arxiv.org/abs/2309.00071, 3.2).
[[nodiscard]] std::vector<float> inverse_frequencies(const RotaryConfig& config, int64_t length = 0);

// The table of all positions. dynamic: position p has the angles of a sequence that ends there, so
// that a token's arithmetic depends on its position alone; that is what transformers computes for a
// sequence generated token by token.
[[nodiscard]] ops::RopeTable rope_table(const RotaryConfig& config, int64_t positions);

}  // namespace phalanx::layers
