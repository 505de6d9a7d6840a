#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "phalanx/layers/lora.h"
#include "phalanx/models/model.h"
#include "phalanx/weights/lora_files.h"

namespace phalanx::models {

// The linear layers that adapters may add to: attention without compression, and MLPs that are no
// mixture of experts.
[[nodiscard]] std::vector<weights::AdaptedModule> adapted_modules(const ModelInfo& info);

// Of a rank's memory for the steps' adapters.
[[nodiscard]] layers::LoraScratch::Shape lora_shape(const ModelInfo& info, const RankLayout& own,
                                                    int64_t max_rank);
// The most that one adapter takes on a rank.
[[nodiscard]] int64_t bytes_of_adapter(const ModelInfo& info, const RankLayout& own,
                                       int64_t max_rank, ops::Isa isa);

// One rank's part of an adapter. Throws Error with all problems.
[[nodiscard]] std::unique_ptr<Adapter> read_own_adapter(const ModelInfo& info,
                                                        const RankLayout& own,
                                                        const std::string& directory,
                                                        int64_t max_rank, ops::Isa isa);
// Of one that read_own_adapter made: one per decoder layer.
[[nodiscard]] std::span<const layers::LoraLayer> layers_of(const Adapter& adapter);

}  // namespace phalanx::models
