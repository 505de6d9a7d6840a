#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "phalanx/tensor/cut.h"

namespace phalanx::ops::cpu {

// Hands out [0, count) in contiguous runs, long ones first, so that a thread streams through
// memory and yet nobody waits long at the end.
inline tensor::Range take_run(std::atomic<int64_t>& next, int64_t count, int64_t threads) {
  int64_t begin = next.load(std::memory_order_relaxed);
  for (;;) {
    if (begin >= count) return {};
    const int64_t run =
        threads == 1 ? count : std::max<int64_t>(1, (count - begin) / (2 * threads));
    if (next.compare_exchange_weak(begin, begin + run, std::memory_order_relaxed))
      return {begin, begin + run};
  }
}

}  // namespace phalanx::ops::cpu
