#include "phalanx/api/fields.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>

#include "phalanx/api/refusal.h"
#include "phalanx/base/json.h"

namespace phalanx::api {
namespace {

[[noreturn]] void wrong_type(const std::string& key, std::string_view type) {
  throw Refused(fmt::format("{} must be {} type.", key, type));
}

}  // namespace

Fields::Fields(const nlohmann::json& object) : object_(object) {}

const nlohmann::json* Fields::find(const std::string& key) {
  read_.insert(key);
  const auto it = object_.find(key);
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

std::optional<bool> Fields::boolean(const std::string& key) {
  const auto* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_boolean()) wrong_type(key, "boolean");
  return value->get<bool>();
}

std::optional<std::string> Fields::string(const std::string& key) {
  const auto* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_string()) wrong_type(key, "string");
  return value->get<std::string>();
}

std::optional<int64_t> Fields::integer(const std::string& key, const Range& range) {
  const auto* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number_integer()) {
    if (!range.type_message.empty()) throw Refused(std::string(range.type_message));
    wrong_type(key, range.type);
  }
  constexpr auto kMax = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  const bool fits = !value->is_number_unsigned() || value->get<uint64_t>() <= kMax;
  if (!fits || value->get<int64_t>() < range.low || value->get<int64_t>() > range.high)
    throw Refused(fmt::format("{}{}{}", range.before, value->dump(), range.after));
  return value->get<int64_t>();
}

std::optional<double> Fields::number_where(const std::string& key, bool (*fits)(double),
                                           std::string_view before, std::string_view after) {
  const auto* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number()) wrong_type(key, "float");
  if (!fits(value->get<double>()))
    throw Refused(fmt::format("{}{}{}", before, value->dump(), after));
  return value->get<double>();
}

std::vector<std::string> Fields::unread() const {
  std::vector<std::string> names;
  for (const auto& [key, value] : object_.items())
    if (!value.is_null() && !read_.contains(key)) names.push_back(key);
  return names;
}

nlohmann::json parse_body(std::string_view body, int max_depth) {
  try {
    nlohmann::json json = parse_json(body, "request body", max_depth);
    if (json.is_object()) return json;
  } catch (const std::exception&) {  // not JSON, too deep, not UTF-8, a number beyond double
  }
  throw Refused("Failed to parse request context to json");
}

int64_t utf16_units(std::string_view text) {
  int64_t units = 0;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if ((byte & 0xC0) != 0x80) units += byte >= 0xF0 ? 2 : 1;
  }
  return units;
}

std::string ignored_header(const std::vector<std::string>& names) {
  constexpr size_t kMaxBytes = 1024;
  std::string text;
  for (const auto& name : names) {
    std::string clean;
    for (const char c : name.substr(0, 64)) {
      const auto byte = static_cast<unsigned char>(c);
      clean += byte > 0x20 && byte < 0x7f && c != ',' ? c : '?';
    }
    if (text.size() + clean.size() > kMaxBytes) return text + ", ...";
    text += (text.empty() ? "" : ", ") + clean;
  }
  return text;
}

}  // namespace phalanx::api
