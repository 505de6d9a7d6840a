#include "apps/config_watch.h"

#include <sys/stat.h>

#include <chrono>
#include <ctime>
#include <nlohmann/json.hpp>
#include <optional>

#include "phalanx/base/guarded_file.h"
#include "phalanx/base/json.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

LogLevelKeys keys_of(const json& root) {
  LogLevelKeys keys;
  if (!root.is_object() || !root.contains("LogConfig")) return keys;
  const json& section = root["LogConfig"];
  if (!section.is_object()) return keys;
  const auto text = [&](const char* key, std::string& target) {
    if (section.contains(key) && section[key].is_string()) target = section[key].get<std::string>();
  };
  text("dynamicLogLevel", keys.level);
  text("dynamicLogLevelValidTime", keys.valid_time);
  if (section.contains("dynamicLogLevelValidHours")) {
    const json& hours = section["dynamicLogLevelValidHours"];
    keys.valid_hours = hours.is_number_unsigned() && hours.get<uint64_t>() <= 168
                           ? hours.get<int>()
                           : 0;
  }
  return keys;
}

std::string stamp_of(const std::string& path) {
  struct stat st {};
  if (::stat(path.c_str(), &st) != 0) return {};
  return fmt::format("{}.{}.{}.{}", st.st_mtim.tv_sec, st.st_mtim.tv_nsec, st.st_size, st.st_ino);
}

}  // namespace

ConfigWatch::ConfigWatch(std::string config_path, LogLevel usual_level, double look_seconds)
    : path_(std::move(config_path)), usual_(usual_level), look_seconds_(look_seconds) {
  if (!path_.empty()) thread_ = std::jthread([this](const std::stop_token& stop) { watch(stop); });
}

ConfigWatch::~ConfigWatch() {
  thread_.request_stop();
  wake_.notify_all();
}

void ConfigWatch::watch(const std::stop_token& stop) {
  LogLevelState state;
  LogLevelKeys keys;
  LogLevel level = usual_;
  std::string stamp;
  while (!stop.stop_requested()) {
    if (std::string now = stamp_of(path_); !now.empty() && now != stamp) {
      stamp = std::move(now);
      Problems problems;
      Problems warnings;
      const std::string text = read_guarded_file(path_, FileRule{}, problems, warnings);
      std::optional<LogLevelKeys> read;
      std::string reason = problems.to_string();
      if (problems.empty()) {
        try {
          read = keys_of(parse_json(text, path_));
          reason = read->problem();
        } catch (const Error& error) {
          reason = error.what();
        }
      }
      if (read && reason.empty())
        keys = *read;
      else
        log_warn("{} changed, but its LogConfig is not taken: {}", path_, reason);
    }
    const LogLevel wanted = state.level_at(keys, usual_, std::time(nullptr));
    if (wanted != level) {
      set_log_level(LogLevel::kInfo);
      log_info("log level {} by LogConfig of {}", wanted == usual_ ? "back to the usual one" : keys.level,
               path_);
      set_log_level(level = wanted);
    }
    std::unique_lock lock(mutex_);
    wake_.wait_for(lock, stop, std::chrono::duration<double>(look_seconds_), [] { return false; });
  }
}

}  // namespace phalanx::apps
