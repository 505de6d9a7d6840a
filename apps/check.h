#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "apps/config.h"
#include "apps/config_security.h"
#include "apps/host.h"
#include "apps/node.h"
#include "phalanx/api/plane_tls.h"

namespace phalanx::apps {

// What `phalanx check` and every start look at, without loading weights: findings of everything at
// once.
struct CheckReport {
  Problems problems;               // a start is refused
  Problems warnings;
  std::vector<std::string> facts;  // what was looked at and is fine, one line each
  NodeConfig config;               // of use for a start if there is no problem
  std::optional<NodePlan> plan;    // what a start decides; there if there is no problem
};

struct CheckOptions {
  bool ports = true;  // try the listeners' ports
  bool text = true;   // read the tokenizer and the chat template
};

// Configuration, environment, rank table, files and directories of the installation, certificates,
// ports, limits, memory, model files.
[[nodiscard]] CheckReport check_start(const ServeArguments& arguments,
                                      const Environment& environment, const CheckOptions& options);

// A listener's certificates, as the server takes them.
[[nodiscard]] api::PlaneTls::Plane listener_tls(const PlaneListener& listener,
                                                const ServerConfig& server);

// Findings as a table: where, rule, found, and what mends it.
[[nodiscard]] std::string findings_table(const Problems& findings);
// [{"what", "where", "found", "expected", "fix"}]
[[nodiscard]] nlohmann::ordered_json findings_json(const Problems& findings);
// {"ok": false, "problems": findings_json, "warnings": findings_json, "facts": [...]}
[[nodiscard]] std::string to_json(const CheckReport& report);

// `phalanx check`: exit status 0, or 1 if a start would be refused.
int check_main(int argc, char** argv);

}  // namespace phalanx::apps
