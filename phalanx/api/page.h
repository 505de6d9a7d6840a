#pragma once

#include <memory>

#include "phalanx/api/core.h"

namespace phalanx::api {

// GET / on the management plane: the instance live, for people, from /v1/status of the same plane and
// without anything from outside. Its chat asks POST /chat there (openai_routes.cc).
void mount_page(const std::shared_ptr<Core>& core, Server& server);

}  // namespace phalanx::api
