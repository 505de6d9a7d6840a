#pragma once

// The LoRA keys of ModelDeployConfig and their like on the command line.

#include <string>

#include "apps/config.h"
#include "apps/config_section.h"

namespace phalanx::apps {

// maxLoras, maxLoraRank, LoraModules. `model` has its name already.
void read_adapter_keys(ConfigSection& section, ModelConfig& model);

// --lora-modules (name=path, or vLLM's JSON object), --max-loras, --max-lora-rank: each before what
// the file says.
void read_adapter_arguments(const ServeArguments& arguments, ModelConfig& model, Problems& problems);

// Where no modules were named: lora_adapter.json beside the weights, {"name": "path", ...}. Then
// checks names, and directories as far as they can be opened.
void complete_adapters(ModelConfig& model, bool check_modes, Problems& problems);

}  // namespace phalanx::apps
