#pragma once

#include <optional>
#include <string>

#include "phalanx/api/service.h"

namespace phalanx::apps {

// generation_config.json of a checkpoint (absent: no defaults) and the end-of-sequence ids, from
// there or from config.json. Throws Error naming file and key.
[[nodiscard]] api::GenerationDefaults read_generation_defaults(const std::string& model_directory);

// enable_thinking of tokenizer_config.json, if it says so.
std::optional<bool> read_thinking_default(const std::string& model_directory);

}  // namespace phalanx::apps
