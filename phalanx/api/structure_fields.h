#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/api/fields.h"
#include "phalanx/text/grammar.h"

namespace phalanx::api {

// The structure a request asks for: response_format, structured_outputs, the guided_* fields, TGI's
// grammar. More than one is a contradiction. `body`: the whole request, for the order of a schema's
// properties. Reference: rest-api sheet, chapter 8. Throws Refused.
[[nodiscard]] std::optional<text::GrammarSpec> read_structure(Fields& fields,
                                                              std::string_view body);

// TGI: "grammar" of its parameters.
[[nodiscard]] std::optional<text::GrammarSpec> read_tgi_grammar(Fields& fields,
                                                                std::string_view body);

// What is not as the sheet wants it in a JSON schema of a request.
void check_schema(const nlohmann::json& schema, const std::string& path);

}  // namespace phalanx::api
