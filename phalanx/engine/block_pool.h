#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace phalanx::engine {

// Which blocks of the KV cache are free. One thread.
class BlockPool {
 public:
  explicit BlockPool(int64_t blocks);
  // Appends `count` blocks to `table`, or leaves it alone and returns false. No allocation while
  // `table` has capacity.
  [[nodiscard]] bool allocate(int64_t count, std::vector<int32_t>& table);
  // Takes all blocks of `table` back and empties it.
  void release(std::vector<int32_t>& table);
  [[nodiscard]] int64_t total() const { return total_; }
  [[nodiscard]] int64_t free() const { return static_cast<int64_t>(free_.size()); }

 private:
  int64_t total_;
  std::vector<int32_t> free_;
};

}  // namespace phalanx::engine
