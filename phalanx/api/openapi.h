#pragma once

#include <string>

#include "phalanx/api/service.h"

namespace phalanx::api {

// The OpenAPI 3.1 document of the business plane; the fields' types and ranges come from the table that
// the parsers read by (field_rules.h).
[[nodiscard]] std::string openapi_document(const ServiceOptions& options);

}  // namespace phalanx::api
