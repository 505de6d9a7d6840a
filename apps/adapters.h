#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "apps/config.h"
#include "phalanx/engine/engine.h"
#include "phalanx/models/model.h"

namespace phalanx::apps {

// What a start decides about LoRA adapters, the same on every node but for the digests.
struct AdapterPlan {
  struct Module {
    std::string name;
    std::string path;
    std::string digest;
  };
  int64_t slots = 0;     // 0: none can be loaded
  int64_t max_rank = 0;
  std::vector<Module> modules;  // to be loaded at the start
};

// Verifies the configured adapters against the model. Throws Error with all problems.
[[nodiscard]] AdapterPlan plan_adapters(const ModelConfig& config, const models::ModelInfo& info);

// Loads those of the plan that the engine has not got yet. Throws Error naming the adapter;
// kUnavailable when the generation was lost meanwhile.
void load_adapters(engine::Engine& engine, const AdapterPlan& plan);

}  // namespace phalanx::apps
