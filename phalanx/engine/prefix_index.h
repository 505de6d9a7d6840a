#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace phalanx::engine {

// Which blocks of the KV cache hold which tokens, as chains: a block is known by the one before it
// and its own token ids. Entries are compared whole, so no collision can give a request another's
// keys and values. One thread; no allocation after construction.
class PrefixIndex {
 public:
  // The place of a chain before its first block. Sequences whose keys and values differ for the
  // same tokens (another adapter, another numeric class) need different salts.
  [[nodiscard]] static uint64_t root(uint64_t salt) { return salt | kRootBit; }

  PrefixIndex(int64_t blocks, int64_t block_size);
  // The block that follows `parent` with these block_size tokens, -1: none.
  [[nodiscard]] int32_t find(uint64_t parent, std::span<const int32_t> tokens) const;
  // Enters the block unless its content is there already; returns the block that has it.
  int32_t insert(uint64_t parent, std::span<const int32_t> tokens, int32_t block);
  void erase(int32_t block);
  [[nodiscard]] bool contains(int32_t block) const { return entry(block).id != 0; }
  // What the next block's parent is. Never used again once the block is erased.
  [[nodiscard]] uint64_t id(int32_t block) const { return entry(block).id; }

 private:
  static constexpr uint64_t kRootBit = uint64_t{1} << 63;
  struct Entry {
    uint64_t id = 0;  // 0: not entered
    uint64_t parent = 0;
    int32_t next = -1;  // in its bucket
  };
  [[nodiscard]] const Entry& entry(int32_t block) const {
    return entries_[static_cast<size_t>(block)];
  }
  [[nodiscard]] size_t bucket(uint64_t parent, std::span<const int32_t> tokens) const;
  [[nodiscard]] std::span<const int32_t> tokens_of(int32_t block) const {
    return std::span<const int32_t>(tokens_).subspan(
        static_cast<size_t>(block) * static_cast<size_t>(block_size_),
        static_cast<size_t>(block_size_));
  }

  int64_t block_size_;
  uint64_t seed_;  // of the hash: nobody outside can choose prompts that meet in one bucket
  uint64_t last_id_ = 0;
  std::vector<Entry> entries_;    // by block
  std::vector<int32_t> tokens_;   // [blocks, block_size]
  std::vector<int32_t> buckets_;  // first block, -1: none
};

}  // namespace phalanx::engine
