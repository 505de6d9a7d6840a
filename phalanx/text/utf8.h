#pragma once

#include <string>
#include <string_view>

namespace phalanx::text {

inline constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// Moves what is decided from `pending` to the result: whole characters, and U+FFFD for each maximal
// part that cannot become one (Unicode 15, 3.9, as Rust's from_utf8_lossy does it). What may still
// become a character stays in `pending` unless `at_end`.
[[nodiscard]] std::string take_characters(std::string& pending, bool at_end);

}  // namespace phalanx::text
