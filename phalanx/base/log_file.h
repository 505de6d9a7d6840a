#pragma once

#include <spdlog/sinks/base_sink.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>

#include "phalanx/base/unique_fd.h"

namespace phalanx {

// A log file of mode 0640 that is renamed when it is full: "name.log" becomes "name.01.log", that
// becomes "name.02.log", and so on up to `kept`; what is older is removed. Not thread-safe.
class LogFile {
 public:
  // Throws Error(kUnavailable) if it cannot be opened.
  LogFile(std::string path, int64_t max_bytes, int kept);
  // Lines that cannot be written (a full disk) are lost, and counted.
  void write(std::string_view line);
  [[nodiscard]] uint64_t lost() const { return lost_; }

 private:
  void open();
  void rotate();
  [[nodiscard]] std::string rotated(int number) const;

  std::string path_;
  int64_t max_bytes_;
  int kept_;
  UniqueFd fd_;
  int64_t size_ = 0;
  uint64_t lost_ = 0;
};

class LogFileSink final : public spdlog::sinks::base_sink<std::mutex> {
 public:
  explicit LogFileSink(LogFile file) : file_(std::move(file)) {}

 private:
  void sink_it_(const spdlog::details::log_msg& message) override {
    spdlog::memory_buf_t line;
    formatter_->format(message, line);
    file_.write({line.data(), line.size()});
  }
  void flush_() override {}

  LogFile file_;
};

}  // namespace phalanx
