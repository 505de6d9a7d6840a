#pragma once

#include <string_view>

#include "phalanx/models/model.h"
#include "phalanx/weights/checkpoint.h"

namespace phalanx::models {

// Gives the experts of a checkpoint the names and shapes of published ones, whatever wrote it:
// transformers 5 holds gate_up_proj [experts, 2 * intermediate, hidden] and down_proj [experts,
// hidden, intermediate], and calls every family's block mlp. Adds what does not fit the count of
// experts: an expert beyond it, a stack of another size.
void name_experts(const ModelInfo& info, weights::Checkpoint& checkpoint, Problems& problems);

// Layers beyond the model's own (multi-token prediction), which are known and not used.
[[nodiscard]] bool beyond_layers(std::string_view tensor, int64_t num_layers);

}  // namespace phalanx::models
