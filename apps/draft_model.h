#pragma once

#include <string>

#include "apps/config.h"
#include "phalanx/base/error.h"
#include "phalanx/models/model.h"

namespace phalanx::apps {

// Adds what keeps the draft model (plugins.draft_model) from guessing for `target`: its config.json,
// weight files' headers, vocabulary and tokenizer. Reads no weights.
void check_draft_model(const NodeConfig& config, const models::ModelInfo& target,
                       Problems& problems);

}  // namespace phalanx::apps
