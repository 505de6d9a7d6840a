#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>

#include "phalanx/api/core.h"
#include "phalanx/engine/step_trace.h"

namespace phalanx::api {

// The steps as a Chrome trace (chrome://tracing, ui.perfetto.dev): a process for the head and one per
// rank; `nodes` has the address of each rank's node.
[[nodiscard]] std::string to_chrome_trace(std::span<const engine::StepTrace> steps,
                                          const std::map<int, std::string>& nodes);

// GET /v1/profile?steps=N&seconds=S on the management plane: the next steps of the whole instance,
// fewer if the time passes first.
void mount_profile(const std::shared_ptr<Core>& core, Server& server);

}  // namespace phalanx::api
