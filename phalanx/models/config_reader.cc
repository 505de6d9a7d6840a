#include "phalanx/models/config_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "phalanx/base/json.h"

namespace phalanx::models {
namespace {

constexpr int64_t kMaxConfigBytes = 16 << 20;

}  // namespace

struct ConfigReader::Node {
  nlohmann::json json;
  std::string file;
  std::string prefix;  // "" or "rope_scaling."

  [[nodiscard]] const nlohmann::json* find(std::string_view key) const {
    const auto at = json.find(std::string(key));
    return at == json.end() || at->is_null() ? nullptr : &*at;
  }
};

ConfigReader::ConfigReader(const std::string& path, Problems& problems) : problems_(&problems) {
  auto node = std::make_shared<Node>();
  node->json = read_json_file(path, kMaxConfigBytes, 32);
  node->file = path;
  if (!node->json.is_object())
    throw Error(Code::kInvalidArgument, fmt::format("{}: found a JSON {}, expected an object", path,
                                                    node->json.type_name()));
  node_ = std::move(node);
}

ConfigReader::ConfigReader(std::shared_ptr<const Node> node, Problems& problems)
    : node_(std::move(node)), problems_(&problems) {}

const std::string& ConfigReader::path() const { return node_->file; }

bool ConfigReader::has(std::string_view key) const { return node_->find(key) != nullptr; }

void ConfigReader::refuse(std::string_view key, std::string what, std::string expected,
                          std::string fix) const {
  const nlohmann::json* value = node_->find(key);
  std::string found =
      value == nullptr ? "" : value->dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  if (found.size() > 100) found = found.substr(0, 97) + "...";
  problems_->add({.what = std::move(what),
                  .where = fmt::format("{}: {}{}", node_->file, node_->prefix, key),
                  .found = std::move(found),
                  .expected = std::move(expected),
                  .fix = std::move(fix)});
}

int64_t ConfigReader::integer(std::string_view key, int64_t least, int64_t most,
                              std::optional<int64_t> absent) const {
  const std::string expected = fmt::format("an integer from {} to {}", least, most);
  const nlohmann::json* value = node_->find(key);
  if (value == nullptr) {
    if (!absent) refuse(key, "key missing", expected);
    return absent.value_or(least);
  }
  if (value->is_number_unsigned() || value->is_number_integer()) {
    const bool huge = value->is_number_unsigned() && value->get<uint64_t>() > INT64_MAX;
    const int64_t n = huge ? INT64_MAX : value->get<int64_t>();
    if (n >= least && n <= most) return n;
    refuse(key, "out of range", expected);
  } else {
    refuse(key, "wrong type", expected);
  }
  return absent.value_or(least);
}

double ConfigReader::number(std::string_view key, double least, double most,
                            std::optional<double> absent) const {
  const std::string expected = fmt::format("a number from {} to {}", least, most);
  const nlohmann::json* value = node_->find(key);
  if (value == nullptr) {
    if (!absent) refuse(key, "key missing", expected);
  } else if (!value->is_number()) {
    refuse(key, "wrong type", expected);
  } else {
    const auto x = value->get<double>();
    if (std::isfinite(x) && x >= least && x <= most) return x;
    refuse(key, "out of range", expected);
  }
  return absent.value_or(least);
}

bool ConfigReader::boolean(std::string_view key, bool absent) const {
  const nlohmann::json* value = node_->find(key);
  if (value == nullptr) return absent;
  if (value->is_boolean()) return value->get<bool>();
  refuse(key, "wrong type", "true or false");
  return absent;
}

std::string ConfigReader::text(std::string_view key, std::optional<std::string> absent) const {
  const nlohmann::json* value = node_->find(key);
  if (value == nullptr) {
    if (!absent) refuse(key, "key missing", "a string");
  } else if (!value->is_string()) {
    refuse(key, "wrong type", "a string");
  } else {
    return value->get<std::string>();
  }
  return absent.value_or("");
}

std::vector<std::string> ConfigReader::texts(std::string_view key) const {
  std::vector<std::string> result;
  const nlohmann::json* value = node_->find(key);
  if (value == nullptr) return result;
  if (!value->is_array() || !std::all_of(value->begin(), value->end(),
                                         [](const auto& item) { return item.is_string(); })) {
    refuse(key, "wrong type", "a list of strings");
    return result;
  }
  for (const auto& item : *value) result.push_back(item.get<std::string>());
  return result;
}

std::vector<int64_t> ConfigReader::integers(std::string_view key, int64_t least,
                                            int64_t most) const {
  std::vector<int64_t> result;
  const nlohmann::json* value = node_->find(key);
  if (value == nullptr) return result;
  const auto fits = [&](const nlohmann::json& item) {
    return item.is_number_integer() &&
           !(item.is_number_unsigned() && item.get<uint64_t>() > INT64_MAX) &&
           item.get<int64_t>() >= least && item.get<int64_t>() <= most;
  };
  if (!value->is_array() || !std::all_of(value->begin(), value->end(), fits)) {
    refuse(key, "wrong type or out of range",
           fmt::format("a list of integers from {} to {}", least, most));
    return result;
  }
  for (const auto& item : *value) result.push_back(item.get<int64_t>());
  return result;
}

std::optional<ConfigReader> ConfigReader::object(std::string_view key) const {
  const nlohmann::json* value = node_->find(key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_object()) {
    refuse(key, "wrong type", "an object");
    return std::nullopt;
  }
  auto node = std::make_shared<Node>();
  node->json = *value;
  node->file = node_->file;
  node->prefix = fmt::format("{}{}.", node_->prefix, key);
  return ConfigReader(std::shared_ptr<const Node>(std::move(node)), *problems_);
}

}  // namespace phalanx::models
