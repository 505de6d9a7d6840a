#pragma once

// The keys of config.json: types, ranges and the rules among them that need nothing but the file.

#include <optional>
#include <string>

#include "apps/config.h"

namespace phalanx::apps {

// What ModelConfig[0] asks for and only the rank table can answer.
struct ParallelRequest {
  std::optional<int64_t> tp;  // "tp"; absent: all ranks
  std::optional<int64_t> moe_tp;
  std::optional<int64_t> moe_ep;
};

// Reads the text of config.json into `config` (server, backend, model, schedule, ignored,
// warnings). `file` is its name for messages. Every finding goes to `problems`; what could not be
// read keeps its default.
void read_config_text(const std::string& text, const std::string& file, NodeConfig& config,
                      ParallelRequest& parallel, Problems& problems);

// 1 to 256 of [a-zA-Z0-9_.-], first and last alphanumeric.
[[nodiscard]] bool is_model_name(const std::string& name);
// IPv4 or IPv6 in numbers.
[[nodiscard]] bool is_ip(const std::string& address);

}  // namespace phalanx::apps
