#include "phalanx/engine/block_pool.h"

#include <cstddef>

#include "phalanx/base/check.h"

namespace phalanx::engine {

BlockPool::BlockPool(int64_t blocks) : total_(blocks) {
  free_.reserve(static_cast<size_t>(blocks));
  for (int64_t i = blocks; i-- > 0;) free_.push_back(static_cast<int32_t>(i));
}

bool BlockPool::allocate(int64_t count, std::vector<int32_t>& table) {
  if (count > free()) return false;
  for (; count > 0; --count) {
    table.push_back(free_.back());
    free_.pop_back();
  }
  return true;
}

void BlockPool::release(std::vector<int32_t>& table) {
  free_.insert(free_.end(), table.rbegin(), table.rend());
  table.clear();
  PHALANX_CHECK(free() <= total_);
}

}  // namespace phalanx::engine
