#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace phalanx {

// Parses text with a bound on nesting. Throws Error(kInvalidArgument) that names `where`, line and
// column. Include <nlohmann/json.hpp> in the .cc that uses the result.
[[nodiscard]] nlohmann::json parse_json(std::string_view text, std::string_view where,
                                        int max_depth = 100);

// Reads a file of at most `max_bytes` and parses it. Throws kNotFound, kInvalidArgument.
[[nodiscard]] nlohmann::json read_json_file(const std::string& path, int64_t max_bytes = 500 << 20,
                                            int max_depth = 100);

// Whole file as text. Throws kNotFound (with errno's text) or kInvalidArgument (too large).
[[nodiscard]] std::string read_text_file(const std::string& path, int64_t max_bytes);

}  // namespace phalanx
