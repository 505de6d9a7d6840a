#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace phalanx {

using Clock = std::chrono::steady_clock;

[[nodiscard]] inline int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch())
      .count();
}

// A point in time by which a wait ends. Every wait of the project takes one.
class Deadline {
 public:
  explicit Deadline(Clock::time_point when) : when_(when) {}
  static Deadline in(Clock::duration d) { return Deadline(Clock::now() + d); }
  static Deadline in_seconds(double s) {
    return in(std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(s)));
  }
  [[nodiscard]] bool passed() const { return Clock::now() >= when_; }
  [[nodiscard]] Clock::time_point when() const { return when_; }
  // Milliseconds left, at least 0, capped; for poll().
  [[nodiscard]] int poll_ms(int cap_ms) const {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(when_ - Clock::now()).count();
    return static_cast<int>(std::clamp<int64_t>(left, 0, cap_ms));
  }

 private:
  Clock::time_point when_;
};

}  // namespace phalanx
