#include <fmt/format.h>

#include <optional>

#include "phalanx/models/registry.h"

namespace phalanx::models {
namespace {

using layers::RotaryConfig;
using tensor::DType;

constexpr int64_t kMaxWidth = 1 << 22;
constexpr int64_t kMaxLayers = 1 << 14;
constexpr int64_t kMaxPositions = 1 << 28;

// torch_dtype until transformers 4, dtype since.
DType read_dtype(const ConfigReader& config) {
  const std::string_view key = config.has("dtype") ? "dtype" : "torch_dtype";
  const std::string name = config.text(key);
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16") return DType::kF16;
  if (name == "float32") return DType::kF32;
  if (!name.empty())
    config.refuse(key, "unknown dtype", "bfloat16, float16 or float32");
  return DType::kBF16;
}

// rope_theta beside rope_scaling until transformers 4, both in rope_parameters since.
RotaryConfig read_rotary(const ConfigReader& config) {
  constexpr double kMaxTheta = 1e15;
  constexpr double kMaxFactor = 1e6;
  RotaryConfig rotary;
  rotary.theta = config.number("rope_theta", 1.0, kMaxTheta, rotary.theta);
  std::optional<ConfigReader> scaling = config.object("rope_parameters");
  if (scaling)
    rotary.theta = scaling->number("rope_theta", 1.0, kMaxTheta, rotary.theta);
  else
    scaling = config.object("rope_scaling");
  if (!scaling) return rotary;

  const char* key = scaling->has("rope_type") ? "rope_type" : "type";
  const std::string type = scaling->text(key, "default");
  if (scaling->number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0)
    scaling->refuse("partial_rotary_factor", "unsupported value", "1.0");
  if (type == "linear") {
    rotary.type = RotaryConfig::Type::kLinear;
  } else if (type == "llama3") {
    rotary.type = RotaryConfig::Type::kLlama3;
    rotary.low_freq_factor = scaling->number("low_freq_factor", 1e-3, kMaxFactor);
    rotary.high_freq_factor = scaling->number("high_freq_factor", 1e-3, kMaxFactor);
    rotary.original_max_position_embeddings =
        scaling->integer("original_max_position_embeddings", 1, kMaxPositions);
    if (rotary.high_freq_factor <= rotary.low_freq_factor)
      scaling->refuse("high_freq_factor", "not above low_freq_factor",
                      fmt::format("more than {}", rotary.low_freq_factor));
  } else if (type != "default") {
    scaling->refuse(key, "unsupported rotary scaling",
                    fmt::format("one of {}", layers::kRotaryTypes));
  }
  if (rotary.type != RotaryConfig::Type::kDefault)
    rotary.factor = scaling->number("factor", 1.0, kMaxFactor);
  return rotary;
}

DecoderConfig read_common(const ConfigReader& config) {
  DecoderConfig result;
  ModelInfo& info = result.info;
  info.dtype = read_dtype(config);
  info.act = info.dtype == DType::kBF16 ? DType::kBF16 : DType::kF32;
  info.num_layers = config.integer("num_hidden_layers", 1, kMaxLayers);
  info.hidden_size = config.integer("hidden_size", 1, kMaxWidth);
  info.intermediate_size = config.integer("intermediate_size", 1, kMaxWidth);
  info.num_attention_heads = config.integer("num_attention_heads", 1, kMaxWidth);
  info.num_key_value_heads =
      config.integer("num_key_value_heads", 1, info.num_attention_heads, info.num_attention_heads);
  if (info.num_attention_heads % info.num_key_value_heads != 0)
    config.refuse("num_key_value_heads", "does not divide the query heads",
                  fmt::format("a divisor of num_attention_heads = {}", info.num_attention_heads));
  info.head_dim = config.integer("head_dim", 2, kMaxWidth,
                                 info.hidden_size / info.num_attention_heads);
  if (info.head_dim < 2 || info.head_dim % 2 != 0)
    config.refuse(config.has("head_dim") ? "head_dim" : "hidden_size", "odd head_dim",
                  fmt::format("an even head_dim, not {}", info.head_dim));
  info.vocab_size = config.integer("vocab_size", 1, INT32_MAX);
  info.max_position_embeddings = config.integer("max_position_embeddings", 1, kMaxPositions, 2048);
  info.tied_embeddings = config.boolean("tie_word_embeddings", false);
  result.rms_norm_eps = static_cast<float>(config.number("rms_norm_eps", 0.0, 1.0, 1e-6));
  result.rotary = read_rotary(config);
  if (config.text("hidden_act", "silu") != "silu")
    config.refuse("hidden_act", "unsupported activation", "silu");
  return result;
}

}  // namespace

DecoderConfig read_llama(const ConfigReader& config) {
  DecoderConfig result = read_common(config);
  const bool attention_bias = config.boolean("attention_bias", false);
  result.info.qkv_bias = attention_bias;
  result.info.output_bias = attention_bias;
  result.info.mlp_bias = config.boolean("mlp_bias", false);
  return result;
}

DecoderConfig read_mistral(const ConfigReader& config) {
  DecoderConfig result = read_common(config);
  result.sliding_window = config.integer("sliding_window", 1, kMaxPositions, 0);
  return result;
}

}  // namespace phalanx::models
