#pragma once

// The environment variables of a node: what is honoured, what is only named, what was renamed.

#include <string>

#include "apps/config.h"

namespace phalanx::apps {

// Value of `name`, empty when unset.
[[nodiscard]] std::string variable(const Environment& environment, const std::string& name);

// PHALANX_MEMORY_GBPS. Part of read_environment().
void read_memory_speed(const Environment& environment, NodeConfig& config, Problems& problems);

// Fills npu_memory_fraction, connect_timeout_s, data ports, logits folder and threads; lists the
// variables that are set without effect; warns about old names and proxies.
void read_environment(const Environment& environment, NodeConfig& config, Problems& problems);

// RANK_TABLE_FILE, else its older name RANKTABLEFILE (with a warning); empty when neither is set.
[[nodiscard]] std::string rank_table_path(const Environment& environment, NodeConfig& config);

}  // namespace phalanx::apps
