#pragma once

#include <cstdint>
#include <utility>

#include "phalanx/base/clock.h"

namespace phalanx::api {

// Milliseconds from receipt to the first piece, then between pieces.
class StepTimes {
 public:
  explicit StepTimes(Clock::time_point received) : last_(received) {}
  struct Step {
    bool first;
    int64_t ms;
  };
  Step next() {
    const auto now = Clock::now();
    const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(now - last_).count();
    last_ = now;
    return {std::exchange(first_, false), ms};
  }

 private:
  Clock::time_point last_;
  bool first_ = true;
};

}  // namespace phalanx::api
