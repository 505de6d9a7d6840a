#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "phalanx/engine/prefix_index.h"

namespace phalanx::engine {

// The blocks of the KV cache: who uses them, and what those that nobody uses still hold.
//
// A block that was filled is published under its chain of tokens; sequences that begin with the
// same tokens share it. Published blocks that nobody uses keep their content until they are needed,
// the least recently used first. One thread; no allocation while tables have capacity.
class BlockPool {
 public:
  struct Options {
    int64_t blocks = 0;
    int64_t block_size = 1;
    bool share_prefixes = false;
  };
  explicit BlockPool(const Options& options);

  // Appends `count` blocks to `table`, or leaves it alone and returns false.
  [[nodiscard]] bool allocate(int64_t count, std::vector<int32_t>& table);
  // Takes all blocks of `table` back and empties it.
  void release(std::vector<int32_t>& table);
  // Appends to the empty `table` the published blocks that `tokens` begin with; returns how many.
  int64_t reuse(uint64_t salt, std::span<const int32_t> tokens, std::vector<int32_t>& table);
  // Publishes a block that is full and computed, under the place that publish() or place() gave for
  // the one before it (the first: PrefixIndex::root). Returns its place.
  uint64_t publish(uint64_t parent, std::span<const int32_t> tokens, int32_t block);
  // Of a block that reuse() gave.
  [[nodiscard]] uint64_t place(int32_t block) const { return index_->id(block); }

  [[nodiscard]] bool shares_prefixes() const { return index_.has_value(); }
  [[nodiscard]] int64_t total() const { return total_; }
  // Blocks that allocate() can give, those with content included.
  [[nodiscard]] int64_t free() const { return static_cast<int64_t>(unused_.size()) + idle_; }

 private:
  // Of one block: how many tables hold it, and its neighbours among the idle ones.
  struct Use {
    int32_t tables = 0;
    int32_t older = -1, newer = -1;
  };
  Use& use(int32_t block) { return uses_[static_cast<size_t>(block)]; }
  int32_t take();
  void append_idle(int32_t block);
  void remove_idle(int32_t block);

  int64_t total_;
  int64_t block_size_;
  std::optional<PrefixIndex> index_;
  std::vector<Use> uses_;
  std::vector<int32_t> unused_;  // without content
  int32_t oldest_ = -1, newest_ = -1;
  int64_t idle_ = 0;  // published, in no table
};

}  // namespace phalanx::engine
