#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "apps/config_log.h"

namespace phalanx::apps {

// Looks at config.json every 5 s for the keys that need no restart: LogConfig. Only reads; a file
// that cannot be used keeps what was, with one warning.
class ConfigWatch {
 public:
  ConfigWatch(std::string config_path, LogLevel usual_level, double look_seconds = 5);
  ~ConfigWatch();

 private:
  void watch(const std::stop_token& stop);

  const std::string path_;
  const LogLevel usual_;
  const double look_seconds_;
  std::mutex mutex_;
  std::condition_variable_any wake_;
  std::jthread thread_;
};

}  // namespace phalanx::apps
