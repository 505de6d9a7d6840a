#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "apps/config.h"
#include "phalanx/base/log.h"

namespace phalanx::apps {

// Options of a node process's log from MINDIE_LOG_* and PHALANX_LOG_FORMAT, `tag` left to the caller.
// Directories that are needed are made (mode 0750). What cannot be understood keeps its default and
// adds a line to `warnings`; nothing throws.
[[nodiscard]] LogOptions node_log_options(const Environment& environment,
                                          std::vector<std::string>& warnings);

// LogConfig of config.json: a level for some hours (config-json.md §8).
struct LogLevelKeys {
  std::string level;        // dynamicLogLevel; empty: the usual one
  int valid_hours = 2;      // dynamicLogLevelValidHours
  std::string valid_time;   // dynamicLogLevelValidTime, "YYYY-MM-DD HH:MM:SS"; empty: from now on
  friend bool operator==(const LogLevelKeys&, const LogLevelKeys&) = default;
  // What cannot be understood of them, or empty.
  [[nodiscard]] std::string problem() const;
};

// Since when the keys hold is kept here: the user's file is never written.
class LogLevelState {
 public:
  // The level at `now` (seconds since 1970). A beginning in the future counts as now.
  [[nodiscard]] LogLevel level_at(const LogLevelKeys& keys, LogLevel usual, int64_t now);

 private:
  LogLevelKeys keys_;
  int64_t since_ = 0;
};

}  // namespace phalanx::apps
