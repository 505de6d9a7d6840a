#pragma once

#include <span>
#include <string_view>

#include "phalanx/models/config_reader.h"
#include "phalanx/models/decoder_config.h"

namespace phalanx::models {

// A family: how its config.json is read. `read` adds what is wrong to the reader's problems.
struct Family {
  std::string_view model_type;
  DecoderConfig (*read)(const ConfigReader& config);
  // Parts of names of tensors that checkpoints hold and the family does not use.
  std::span<const std::string_view> known_extras;
};

[[nodiscard]] std::span<const Family> families();

// Looks up model_type of config.json. Throws Error(kInvalidArgument) with the list of known ones.
[[nodiscard]] const Family& family_of(const ConfigReader& config);

// Reads config.json of a checkpoint directory. Throws Error with all problems.
struct FamilyConfig {
  const Family* family = nullptr;
  DecoderConfig config;
};
[[nodiscard]] FamilyConfig read_config(const std::string& directory);

// --- families, one .cc each
[[nodiscard]] DecoderConfig read_llama(const ConfigReader& config);
[[nodiscard]] DecoderConfig read_mistral(const ConfigReader& config);
[[nodiscard]] DecoderConfig read_qwen2(const ConfigReader& config);
[[nodiscard]] DecoderConfig read_qwen3(const ConfigReader& config);
[[nodiscard]] DecoderConfig read_ernie4_5(const ConfigReader& config);
[[nodiscard]] DecoderConfig read_mixtral(const ConfigReader& config);
[[nodiscard]] DecoderConfig read_deepseek(const ConfigReader& config);
[[nodiscard]] DecoderConfig read_deepseek_v2(const ConfigReader& config);
[[nodiscard]] DecoderConfig read_deepseek_v3(const ConfigReader& config);
[[nodiscard]] DecoderConfig read_qwen2_moe(const ConfigReader& config);
[[nodiscard]] DecoderConfig read_qwen3_moe(const ConfigReader& config);
[[nodiscard]] DecoderConfig read_glm4_moe(const ConfigReader& config);
[[nodiscard]] DecoderConfig read_ernie4_5_moe(const ConfigReader& config);

}  // namespace phalanx::models
