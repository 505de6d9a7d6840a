#include "phalanx/models/decoder_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>

namespace phalanx::models {
namespace {

using layers::RotaryConfig;
using tensor::DType;

constexpr int64_t kMaxLayers = 1 << 14;
constexpr double kMaxTheta = 1e15;
constexpr double kMaxFactor = 1e6;

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

void read_llama3(const ConfigReader& scaling, RotaryConfig& rotary) {
  rotary.type = RotaryConfig::Type::kLlama3;
  rotary.low_freq_factor = scaling.number("low_freq_factor", 1e-3, kMaxFactor);
  rotary.high_freq_factor = scaling.number("high_freq_factor", 1e-3, kMaxFactor);
  if (rotary.high_freq_factor <= rotary.low_freq_factor)
    scaling.refuse("high_freq_factor", "not above low_freq_factor",
                   fmt::format("more than {}", rotary.low_freq_factor));
}

void read_yarn(const ConfigReader& scaling, RotaryConfig& rotary) {
  rotary.type = RotaryConfig::Type::kYarn;
  const auto or_else = [](double value, double otherwise) { return value == 0 ? otherwise : value; };
  rotary.beta_fast = or_else(scaling.number("beta_fast", 0.0, kMaxFactor, 32.0), 32.0);
  rotary.beta_slow = or_else(scaling.number("beta_slow", 0.0, kMaxFactor, 1.0), 1.0);
  rotary.truncate = scaling.boolean("truncate", true);
  const double mscale = scaling.number("mscale", 0.0, kMaxFactor, 0.0);
  const double all_dim = scaling.number("mscale_all_dim", 0.0, kMaxFactor, 0.0);
  const double factor = mscale != 0 && all_dim != 0 ? layers::yarn_mscale(rotary.factor, mscale) /
                                                          layers::yarn_mscale(rotary.factor, all_dim)
                                                    : layers::yarn_mscale(rotary.factor, 1.0);
  rotary.attention_factor = scaling.number("attention_factor", 1e-6, kMaxFactor, factor);
}

}  // namespace

RotaryConfig read_rotary(const ConfigReader& config, const DecoderDefaults& defaults,
                         int64_t head_dim) {
  RotaryConfig rotary;
  rotary.theta = config.number("rope_theta", 1.0, kMaxTheta, defaults.rope_theta);
  double part =
      config.number("partial_rotary_factor", 0.0, 1.0, defaults.partial_rotary_factor);
  std::optional<ConfigReader> scaling = config.object("rope_parameters");
  if (scaling)
    rotary.theta = scaling->number("rope_theta", 1.0, kMaxTheta, rotary.theta);
  else
    scaling = config.object("rope_scaling");
  if (scaling) part = scaling->number("partial_rotary_factor", 0.0, 1.0, part);
  rotary.rotary_dim = static_cast<int64_t>(static_cast<double>(head_dim) * part);
  if (rotary.rotary_dim < 2 || rotary.rotary_dim % 2 != 0) {
    (scaling && scaling->has("partial_rotary_factor") ? *scaling : config)
        .refuse("partial_rotary_factor", "odd rotary dimensions",
                fmt::format("an even number from 2 on of the head's {}", head_dim));
    rotary.rotary_dim = 2;
  }
  if (!scaling) return rotary;

  const char* key = scaling->has("rope_type") ? "rope_type" : "type";
  const std::string type = scaling->text(key, "default");
  if (type == "default") return rotary;
  const int64_t positions = config.integer("max_position_embeddings", 1, kMaxPositions, 2048);
  const bool may_extend = type == "yarn" && scaling->has("original_max_position_embeddings");
  rotary.original_max_position_embeddings =
      type == "dynamic"
          ? positions
          : scaling->integer("original_max_position_embeddings", 1, kMaxPositions, positions);
  rotary.factor = scaling->number(
      "factor", 1.0, kMaxFactor,
      may_extend ? std::optional(std::max(
                       1.0, static_cast<double>(positions) /
                                static_cast<double>(rotary.original_max_position_embeddings)))
                 : std::nullopt);
  if (type == "linear") {
    rotary.type = RotaryConfig::Type::kLinear;
  } else if (type == "dynamic") {
    rotary.type = RotaryConfig::Type::kDynamic;
    if (rotary.rotary_dim < 4)
      scaling->refuse(key, "too few rotary dimensions for this scaling", "at least 4");
  } else if (type == "llama3") {
    read_llama3(*scaling, rotary);
  } else if (type == "yarn") {
    read_yarn(*scaling, rotary);
  } else {
    scaling->refuse(key, "unsupported rotary scaling",
                    fmt::format("one of {}", layers::kRotaryTypes));
  }
  return rotary;
}

DecoderConfig read_decoder(const ConfigReader& config, const DecoderDefaults& defaults) {
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
  info.head_dim = config.integer(
      "head_dim", 2, kMaxWidth,
      defaults.head_dim > 0 ? defaults.head_dim : info.hidden_size / info.num_attention_heads);
  // Latent attention has widths of its own; its hidden size need not be one of heads.
  const bool latent = config.has("qk_rope_head_dim");
  if (!latent && (info.head_dim < 2 || info.head_dim % 2 != 0)) {
    config.refuse(config.has("head_dim") ? "head_dim" : "hidden_size", "odd head_dim",
                  fmt::format("an even head_dim, not {}", info.head_dim));
    info.head_dim = 2;
  }
  info.vocab_size = config.integer("vocab_size", 1, INT32_MAX);
  info.max_position_embeddings = config.integer("max_position_embeddings", 1, kMaxPositions, 2048);
  info.tied_embeddings = config.boolean("tie_word_embeddings", defaults.tied_embeddings);
  result.rms_norm_eps =
      static_cast<float>(config.number("rms_norm_eps", 0.0, 1.0, defaults.rms_norm_eps));
  const int64_t rope_head =
      config.integer("qk_rope_head_dim", 2, kMaxWidth, info.head_dim);
  result.rotary = read_rotary(config, defaults, rope_head);
  if (result.rotary.type == RotaryConfig::Type::kYarn)
    info.max_position_embeddings = std::max(
        info.max_position_embeddings,
        static_cast<int64_t>(result.rotary.factor *
                             static_cast<double>(result.rotary.original_max_position_embeddings)));
  result.attention_scale = 1.0 / std::sqrt(static_cast<double>(info.head_dim));
  result.windows.assign(static_cast<size_t>(info.num_layers), 0);
  if (config.text("hidden_act", "silu") != "silu")
    config.refuse("hidden_act", "unsupported activation", "silu");
  return result;
}

void set_window(DecoderConfig& config, int64_t window) {
  config.windows.assign(config.windows.size(), window);
}

void read_qwen_windows(const ConfigReader& reader, DecoderConfig& config) {
  if (!reader.boolean("use_sliding_window", false)) return;
  const int64_t window = reader.integer("sliding_window", 1, kMaxPositions, 4096);
  const int64_t first = reader.integer("max_window_layers", 0, kMaxPositions, 28);
  const std::vector<std::string> types = reader.texts("layer_types");
  if (!types.empty() && types.size() != config.windows.size()) {
    reader.refuse("layer_types", "another number of layers",
                  fmt::format("{} entries, one per layer", config.windows.size()));
    return;
  }
  for (size_t i = 0; i < config.windows.size(); ++i) {
    const bool slides = types.empty() ? static_cast<int64_t>(i) >= first
                                      : types[i] == "sliding_attention";
    if (!types.empty() && !slides && types[i] != "full_attention")
      reader.refuse("layer_types", "unknown attention", "full_attention or sliding_attention");
    config.windows[i] = slides ? window : 0;
  }
}

}  // namespace phalanx::models
