#pragma once

#include <fmt/format.h>

#include <string>
#include <string_view>

namespace phalanx {

enum class LogLevel { kDebug, kInfo, kWarn, kError };

struct LogOptions {
  LogLevel level = LogLevel::kInfo;
  bool to_stderr = true;
  std::string file;        // empty: no file; its directory must exist
  int file_mb = 20;        // rotation size
  int file_count = 10;     // rotated files kept
  std::string tag;         // who speaks, e.g. "node 127.0.0.1" or "rank 3"; may be empty
  bool json = false;       // one JSON object per line: time, level, pid, who, message
  bool verbose = true;     // false: without process and speaker
  std::string audit_file;  // empty: no audit log; its directory must exist
};

// Once, early in main and in every child. Thread-safe afterwards.
void set_up_log(const LogOptions& options);
[[nodiscard]] bool log_enabled(LogLevel level);
void log_line(LogLevel level, std::string_view line);
// From any thread, at any time.
void set_log_level(LogLevel level);
// One record of the audit log (ranktable-and-env.md §6.3): who asked for what, and how it ended.
// `caller` is "address:port" or "system". Without effect where no audit log is kept.
void log_audit(std::string_view caller, std::string_view operation, std::string_view result);

template <typename... Args>
void log_debug(fmt::format_string<Args...> format, Args&&... args) {
  if (log_enabled(LogLevel::kDebug))
    log_line(LogLevel::kDebug, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void log_info(fmt::format_string<Args...> format, Args&&... args) {
  if (log_enabled(LogLevel::kInfo))
    log_line(LogLevel::kInfo, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void log_warn(fmt::format_string<Args...> format, Args&&... args) {
  if (log_enabled(LogLevel::kWarn))
    log_line(LogLevel::kWarn, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void log_error(fmt::format_string<Args...> format, Args&&... args) {
  if (log_enabled(LogLevel::kError))
    log_line(LogLevel::kError, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace phalanx
