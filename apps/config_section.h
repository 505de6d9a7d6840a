#pragma once

// Typed reading of one JSON object that collects every finding instead of stopping at the first.

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/base/error.h"

namespace phalanx::apps {

struct IntegerRange {
  int64_t min = INT64_MIN;
  int64_t max = INT64_MAX;
};

enum class Need { kMandatory, kOptional };

// A view of one object of config.json. `path` is its key path ("ServerConfig"), empty for the root.
// The object, `problems` and `ignored` outlive the section. Not thread-safe.
class ConfigSection {
 public:
  ConfigSection(const nlohmann::json& object, std::string file, std::string path,
                Problems& problems, std::vector<std::string>& ignored);

  // Each reads `key` into `target` and returns true; when the key is absent, of another type or out
  // of range `target` (which holds the default shown in the fix) stays, and a problem is added
  // unless the key is merely absent and optional.
  bool integer(std::string_view key, Need need, IntegerRange range, int64_t& target);
  bool integer(std::string_view key, Need need, IntegerRange range, int& target);
  bool boolean(std::string_view key, Need need, bool& target);
  bool string(std::string_view key, Need need, std::string& target);
  bool strings(std::string_view key, Need need, size_t min_count, size_t max_count,
               std::vector<std::string>& target);
  bool device_ids(std::string_view key, Need need, std::vector<std::vector<int>>& target);

  // The object or array under `key` for further reading; null when absent or of another type (then
  // a problem is added as above).
  const nlohmann::json* object(std::string_view key, Need need);
  const nlohmann::json* array(std::string_view key, Need need);
  // Whatever is under `key`, or null. Marks the key as known.
  const nlohmann::json* any(std::string_view key);

  // Known keys that have no effect here: listed in `ignored` when present.
  void without_effect(std::initializer_list<std::string_view> keys);
  // Lists `key` (whose value was read already) as being without effect.
  void list_ignored(std::string_view key, std::string_view remark);
  // Lists every key that nobody asked for, with the known key it may have been meant to be.
  void finish();

  [[nodiscard]] std::string where(std::string_view key) const;     // "<file>: ServerConfig.port"
  [[nodiscard]] std::string key_path(std::string_view key) const;  // "ServerConfig.port"
  void problem(std::string_view key, std::string what, std::string found, std::string expected,
               std::string fix);

 private:
  const nlohmann::json* find(std::string_view key, Need need, std::string_view expected,
                             std::string_view example);
  void wrong_type(std::string_view key, const nlohmann::json& value, std::string_view expected,
                  std::string_view example);

  const nlohmann::json& object_;
  std::string file_;
  std::string path_;
  Problems& problems_;
  std::vector<std::string>& ignored_;
  std::set<std::string, std::less<>> known_;
};

// `known` member nearest to `word` within two edits, or empty.
[[nodiscard]] std::string nearest_word(std::string_view word,
                                       const std::set<std::string, std::less<>>& known);

}  // namespace phalanx::apps
