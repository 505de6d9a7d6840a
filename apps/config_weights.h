#pragma once

// Admission of a weight directory before anything of it is loaded.

#include <cstdint>
#include <optional>
#include <string>

#include "phalanx/base/error.h"

namespace phalanx::apps {

struct WeightRules {
  bool strict = true;       // false: owner, mode and link findings only warn (--model)
  bool check_modes = true;  // MINDIE_CHECK_INPUTFILES_PERMISSION=0: owner and mode only warn
  int max_json_depth = 10;
};

// What the start needs to know of the model before it reads a tensor.
struct WeightFacts {
  std::optional<int64_t> query_heads;    // num_attention_heads
  std::optional<int64_t> max_positions;  // max_position_embeddings
};

// Checks the directory, its config.json and generation_config.json.
[[nodiscard]] WeightFacts check_weight_directory(const std::string& directory,
                                                 const std::string& where, const WeightRules& rules,
                                                 Problems& problems, Problems& warnings);

}  // namespace phalanx::apps
