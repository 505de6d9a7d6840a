#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include "phalanx/base/clock.h"

namespace phalanx {

enum class ProgressUnit { kItems, kBytes };

struct ProgressOptions {
  std::optional<bool> terminal;                // default: whether stderr is one
  double line_every_seconds = 2.0;             // between log lines
  std::optional<Clock::time_point> start;      // of the work; default: now
  std::function<void(std::string_view)> draw;  // default: to stderr, for a terminal
  std::function<void(std::string_view)> line;  // default: log_info
};

// Says how far a long piece of work is: a bar that redraws itself (at most ten times a second) on a
// terminal, otherwise a log line every two seconds and one at the end. Work that ends within the
// first interval gives that one line only. Thread-safe.
class Progress {
 public:
  // `total` in the unit; 0: unknown.
  Progress(std::string what, int64_t total, ProgressUnit unit = ProgressUnit::kItems,
           ProgressOptions options = {});
  // Leaves a bar that is not done() on its own line.
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void advance(int64_t n);
  // The closing line, with amount, seconds and rate. Further calls do nothing.
  void done();

 private:
  [[nodiscard]] std::string text() const;
  void show_bar();

  const std::string what_;
  const int64_t total_;
  const ProgressUnit unit_;
  ProgressOptions options_;
  const bool terminal_;
  const Clock::time_point start_;

  std::mutex mutex_;  // guards what follows
  int64_t current_ = 0;
  Clock::time_point shown_ = Clock::now();
  bool bar_drawn_ = false;
  bool done_ = false;
};

}  // namespace phalanx
