#pragma once

#include <CLI/CLI.hpp>
#include <optional>

#include "phalanx/models/model.h"

namespace phalanx::apps {

// --kv-dtype and --kv-cache-dtype: what the KV cache holds. `kv` stays empty without them.
void add_kv_option(CLI::App& app, std::optional<models::KvDtype>& kv);

}  // namespace phalanx::apps
