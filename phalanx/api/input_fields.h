#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "phalanx/api/fields.h"
#include "phalanx/api/service.h"

namespace phalanx::api {

// "inputs" or "text_input": a text, or an array of parts of type text, which are joined. Throws
// Refused.
[[nodiscard]] std::string read_text_input(Fields& fields, const std::string& key,
                                          const ServiceOptions& options);

// An array of token ids, each 0 … 1048576; `key` names it in errors.
[[nodiscard]] std::vector<int32_t> read_id_input(const nlohmann::json& value, const std::string& key);

// "parameters": an object, or nothing.
[[nodiscard]] const nlohmann::json& read_parameters(Fields& fields);

}  // namespace phalanx::api
