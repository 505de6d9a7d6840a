#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>

#include <fmt/format.h>

namespace phalanx {

// Bounds how often strangers can make this process write a line. Thread-safe.
class LogLimit {
 public:
  explicit LogLimit(int per_minute = 60) : per_minute_(per_minute) {}

  // Whether a line may be written now. `note` receives what to append to it: nothing, or how many
  // were left out before it.
  [[nodiscard]] bool allow(std::string* note) {
    const auto now = std::chrono::steady_clock::now();
    const std::lock_guard lock(mutex_);
    if (now >= next_) {
      next_ = now + std::chrono::minutes(1);
      written_ = 0;
    }
    if (written_ == per_minute_) {
      ++left_out_;
      return false;
    }
    ++written_;
    *note = left_out_ > 0 ? fmt::format(" ({} more like this were not shown)", left_out_) : "";
    left_out_ = 0;
    return true;
  }

 private:
  const int per_minute_;
  std::mutex mutex_;
  std::chrono::steady_clock::time_point next_{};  // guarded by mutex_, as what follows
  int written_ = 0;
  int64_t left_out_ = 0;
};

}  // namespace phalanx
