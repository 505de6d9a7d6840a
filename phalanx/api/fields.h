#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace phalanx::api {

// Reads the fields of a request object and remembers which it has been asked for. A null counts as
// absent. Throws Refused with "<key> must be <type> type." for another type.
class Fields {
 public:
  // `object` must outlive this.
  explicit Fields(const nlohmann::json& object);
  [[nodiscard]] const nlohmann::json* find(const std::string& key);
  [[nodiscard]] std::optional<bool> boolean(const std::string& key);
  [[nodiscard]] std::optional<std::string> string(const std::string& key);
  // A whole number in [low, high]; `type` is the word for another type. Out of range: the message is
  // before + the value as it was written + after.
  struct Range {
    int64_t low, high;
    std::string_view type = "integer", before, after = {};
    std::string_view type_message = {};  // instead of "<key> must be <type> type."
  };
  [[nodiscard]] std::optional<int64_t> integer(const std::string& key, const Range& range);
  // A number for which `fits` holds.
  [[nodiscard]] std::optional<double> number_where(const std::string& key, bool (*fits)(double),
                                                   std::string_view before,
                                                   std::string_view after = ".");
  // Names present and not null that nobody asked for.
  [[nodiscard]] std::vector<std::string> unread() const;

 private:
  const nlohmann::json& object_;
  std::set<std::string> read_;
};

// The body of an inference request: a JSON object of bounded depth, valid UTF-8. Throws Refused.
[[nodiscard]] nlohmann::json parse_body(std::string_view body, int max_depth);

// Length of UTF-8 text in UTF-16 units.
[[nodiscard]] int64_t utf16_units(std::string_view text);

// Value of X-Phalanx-Ignored; empty when there is nothing to say.
[[nodiscard]] std::string ignored_header(const std::vector<std::string>& names);

}  // namespace phalanx::api
