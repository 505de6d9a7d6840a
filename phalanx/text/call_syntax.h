#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/text/tool_calls.h"

// The pieces of which calls are written. A scan looks at the begin of a text that may go on: kMore
// until the verdict can no longer change, whatever follows.
namespace phalanx::text::syntax {

enum class Scan { kMore, kBad, kGood };

// A JSON object or array, by its brackets and strings only. `end`: bytes of it.
[[nodiscard]] Scan scan_json(std::string_view text, size_t* end);

// {"name": …, "arguments" or "parameters": object or the JSON text of one}; no arguments are {}.
[[nodiscard]] std::optional<ToolCall> call_of_object(std::string_view object);
[[nodiscard]] std::optional<ToolCall> call_of_arguments(std::string name, std::string_view object);
// An array of such objects, not empty.
[[nodiscard]] std::optional<std::vector<ToolCall>> calls_of_array(std::string_view array);

// What follows "tool_call(": key=value, … ) with values as Python writes literals.
[[nodiscard]] Scan scan_python_call(std::string_view text, size_t* end, std::string* arguments);

// A call written with tags; `text` begins behind the one that opens it, at the name.
struct Tags {
  std::string_view name_end, parameter, parameter_name_end, parameter_end, call_end;
  bool says_string;  // parameters say string="true" or "false"; else the tool's schema has their types
};
inline constexpr Tags kXml{">", "<parameter=", ">", "</parameter>", "</function>", false};
inline constexpr Tags kDsml{"\">", "<｜DSML｜parameter name=\"", ">", "</｜DSML｜parameter>",
                            "</｜DSML｜invoke>", true};
[[nodiscard]] Scan scan_tagged_call(std::string_view text, const Tags& tags,
                                    const std::map<std::string, std::string>& tools, size_t* end,
                                    ToolCall* call);

// A function's name as a model may write it: letters, digits, _ - . and characters beyond ASCII.
[[nodiscard]] bool is_name(std::string_view name);
[[nodiscard]] std::string_view trimmed(std::string_view text);
[[nodiscard]] std::string_view trimmed_right(std::string_view text);
[[nodiscard]] size_t skip_space(std::string_view text, size_t at);
// Bytes at the end of `text` that are a proper prefix of one of `marks`.
[[nodiscard]] size_t partial_suffix(std::string_view text, const std::vector<std::string>& marks);

}  // namespace phalanx::text::syntax
