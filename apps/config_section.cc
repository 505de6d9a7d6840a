#include "apps/config_section.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>

namespace phalanx::apps {
namespace {

using nlohmann::json;

// Type and value, cut to a readable length: `string "1025"`.
std::string describe(const json& value) {
  constexpr size_t kLongest = 60;
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  const char* type = value.type_name();
  if (value.is_number_float()) type = "non-integer number";
  if (value.is_number_integer()) type = "integer";
  return value.is_null() ? "null" : fmt::format("{} {}", type, text);
}

std::string range_text(IntegerRange range) {
  if (range.min == INT64_MIN && range.max == INT64_MAX) return "an integer";
  if (range.max == INT64_MAX) return fmt::format("an integer of at least {}", range.min);
  return fmt::format("an integer in [{}, {}]", range.min, range.max);
}

size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t above = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0 : 1)});
      diagonal = above;
    }
  }
  return row[b.size()];
}

}  // namespace

std::string nearest_word(std::string_view word, const std::set<std::string, std::less<>>& known) {
  constexpr size_t kLongestWord = 64;
  constexpr size_t kEdits = 2;
  std::string best;
  size_t best_distance = kEdits + 1;
  if (word.size() < 4 || word.size() > kLongestWord) return best;
  for (const std::string& candidate : known) {
    const size_t distance = edit_distance(word, candidate);
    if (distance < best_distance) {
      best_distance = distance;
      best = candidate;
    }
  }
  return best;
}

ConfigSection::ConfigSection(const json& object, std::string file, std::string path,
                             Problems& problems, std::vector<std::string>& ignored)
    : object_(object),
      file_(std::move(file)),
      path_(std::move(path)),
      problems_(problems),
      ignored_(ignored) {}

std::string ConfigSection::key_path(std::string_view key) const {
  return path_.empty() ? std::string(key) : fmt::format("{}.{}", path_, key);
}

std::string ConfigSection::where(std::string_view key) const {
  return fmt::format("{}: {}", file_, key_path(key));
}

void ConfigSection::problem(std::string_view key, std::string what, std::string found,
                            std::string expected, std::string fix) {
  problems_.add({.what = std::move(what),
                 .where = where(key),
                 .found = std::move(found),
                 .expected = std::move(expected),
                 .fix = std::move(fix)});
}

const json* ConfigSection::any(std::string_view key) {
  known_.emplace(key);
  const auto it = object_.find(key);
  return it == object_.end() ? nullptr : &*it;
}

const json* ConfigSection::find(std::string_view key, Need need, std::string_view expected,
                                std::string_view example) {
  const json* value = any(key);
  if (value == nullptr && need == Need::kMandatory)
    problem(key, "missing key", "nothing", std::string(expected),
            fmt::format("add \"{}\": {} to {}", key, example,
                        path_.empty() ? "the file" : fmt::format("\"{}\"", path_)));
  return value;
}

void ConfigSection::wrong_type(std::string_view key, const json& value, std::string_view expected,
                               std::string_view example) {
  problem(key, "wrong type", describe(value), std::string(expected),
          fmt::format("write \"{}\": {}", key, example));
}

bool ConfigSection::integer(std::string_view key, Need need, IntegerRange range, int64_t& target) {
  const std::string expected = range_text(range);
  const std::string example = std::to_string(target);
  const json* value = find(key, need, expected, example);
  if (value == nullptr) return false;
  if (!value->is_number_integer()) {
    wrong_type(key, *value, expected, example);
    return false;
  }
  const bool too_big =
      value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
  if (too_big || value->get<int64_t>() < range.min || value->get<int64_t>() > range.max) {
    problem(key, "value out of range", value->dump(), expected,
            fmt::format("write a value in that range, e.g. \"{}\": {}", key, example));
    return false;
  }
  target = value->get<int64_t>();
  return true;
}

bool ConfigSection::integer(std::string_view key, Need need, IntegerRange range, int& target) {
  int64_t wide = target;
  range.min = std::max<int64_t>(range.min, INT32_MIN);
  range.max = std::min<int64_t>(range.max, INT32_MAX);
  if (!integer(key, need, range, wide)) return false;
  target = static_cast<int>(wide);
  return true;
}

bool ConfigSection::boolean(std::string_view key, Need need, bool& target) {
  const char* example = target ? "true" : "false";
  const json* value = find(key, need, "true or false", example);
  if (value == nullptr) return false;
  if (!value->is_boolean()) {
    wrong_type(key, *value, "true or false", example);
    return false;
  }
  target = value->get<bool>();
  return true;
}

bool ConfigSection::string(std::string_view key, Need need, std::string& target) {
  const std::string example = json(target.empty() ? "..." : target).dump();
  const json* value = find(key, need, "a string", example);
  if (value == nullptr) return false;
  if (!value->is_string()) {
    wrong_type(key, *value, "a string", example);
    return false;
  }
  target = value->get<std::string>();
  return true;
}

bool ConfigSection::strings(std::string_view key, Need need, size_t min_count, size_t max_count,
                            std::vector<std::string>& target) {
  const std::string expected = fmt::format("an array of {} to {} strings", min_count, max_count);
  const std::string example = json(target).dump();
  const json* value = find(key, need, expected, example);
  if (value == nullptr) return false;
  if (!value->is_array() ||
      !std::all_of(value->begin(), value->end(), [](const json& v) { return v.is_string(); })) {
    wrong_type(key, *value, expected, example);
    return false;
  }
  if (value->size() < min_count || value->size() > max_count) {
    problem(key, "wrong number of entries", fmt::format("{} entries", value->size()), expected,
            fmt::format("e.g. \"{}\": {}", key, example));
    return false;
  }
  target = value->get<std::vector<std::string>>();
  return true;
}

bool ConfigSection::device_ids(std::string_view key, Need need,
                               std::vector<std::vector<int>>& target) {
  constexpr std::string_view kExpected = "an array of arrays of integers of at least 0";
  constexpr std::string_view kExample = "[[0,1,2,3]]";
  const json* value = find(key, need, kExpected, kExample);
  if (value == nullptr) return false;
  std::vector<std::vector<int>> ids;
  bool good = value->is_array();
  if (good) {
    for (const json& instance : *value) {
      if (!instance.is_array()) {
        good = false;
        break;
      }
      std::vector<int>& inner = ids.emplace_back();
      for (const json& id : instance) {
        if (!id.is_number_unsigned() || id.get<uint64_t>() > INT32_MAX) {
          good = false;
          break;
        }
        inner.push_back(id.get<int>());
      }
    }
  }
  if (!good) {
    wrong_type(key, *value, kExpected, kExample);
    return false;
  }
  target = std::move(ids);
  return true;
}

const json* ConfigSection::object(std::string_view key, Need need) {
  const json* value = find(key, need, "an object", "{...}");
  if (value == nullptr) return nullptr;
  if (!value->is_object()) {
    wrong_type(key, *value, "an object", "{...}");
    return nullptr;
  }
  return value;
}

const json* ConfigSection::array(std::string_view key, Need need) {
  const json* value = find(key, need, "an array", "[...]");
  if (value == nullptr) return nullptr;
  if (!value->is_array()) {
    wrong_type(key, *value, "an array", "[...]");
    return nullptr;
  }
  return value;
}

void ConfigSection::without_effect(std::initializer_list<std::string_view> keys) {
  for (const std::string_view key : keys)
    if (any(key) != nullptr) ignored_.push_back(key_path(key));
}

void ConfigSection::list_ignored(std::string_view key, std::string_view remark) {
  ignored_.push_back(remark.empty() ? key_path(key)
                                    : fmt::format("{} ({})", key_path(key), remark));
}

void ConfigSection::finish() {
  for (const auto& item : object_.items()) {
    if (known_.contains(item.key())) continue;
    const std::string near = nearest_word(item.key(), known_);
    list_ignored(item.key(),
                 near.empty() ? "unknown key" : fmt::format("unknown key, did you mean {}?", near));
  }
}

}  // namespace phalanx::apps
