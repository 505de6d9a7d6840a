#include "phalanx/engine/block_pool.h"

#include <cstddef>

#include "phalanx/base/check.h"

namespace phalanx::engine {

BlockPool::BlockPool(const Options& options)
    : total_(options.blocks),
      block_size_(options.block_size),
      uses_(static_cast<size_t>(options.blocks)) {
  if (options.share_prefixes) index_.emplace(options.blocks, options.block_size);
  unused_.reserve(static_cast<size_t>(options.blocks));
  for (int64_t i = options.blocks; i-- > 0;) unused_.push_back(static_cast<int32_t>(i));
}

int32_t BlockPool::take() {
  int32_t block = oldest_;
  if (!unused_.empty()) {
    block = unused_.back();
    unused_.pop_back();
  } else {
    remove_idle(block);
    index_->erase(block);
  }
  use(block).tables = 1;
  return block;
}

bool BlockPool::allocate(int64_t count, std::vector<int32_t>& table) {
  if (count > free()) return false;
  for (; count > 0; --count) table.push_back(take());
  return true;
}

// The last block of a table is the first to lose its content: those before it are of use without
// it, but not the other way round.
void BlockPool::release(std::vector<int32_t>& table) {
  for (size_t i = table.size(); i-- > 0;) {
    const int32_t block = table[i];
    PHALANX_CHECK(use(block).tables > 0);
    if (--use(block).tables > 0) continue;
    if (index_ && index_->contains(block)) {
      append_idle(block);
    } else {
      unused_.push_back(block);
    }
  }
  table.clear();
  PHALANX_CHECK(free() <= total_);
}

int64_t BlockPool::reuse(uint64_t salt, std::span<const int32_t> tokens,
                         std::vector<int32_t>& table) {
  PHALANX_CHECK(table.empty());
  if (!index_) return 0;
  const auto size = static_cast<size_t>(block_size_);
  uint64_t parent = PrefixIndex::root(salt);
  for (size_t begin = 0; begin + size <= tokens.size(); begin += size) {
    const int32_t block = index_->find(parent, tokens.subspan(begin, size));
    if (block < 0) break;
    if (use(block).tables++ == 0) remove_idle(block);
    table.push_back(block);
    parent = index_->id(block);
  }
  return std::ssize(table);
}

uint64_t BlockPool::publish(uint64_t parent, std::span<const int32_t> tokens, int32_t block) {
  PHALANX_CHECK(index_ && use(block).tables > 0);
  return index_->id(index_->insert(parent, tokens, block));
}

void BlockPool::append_idle(int32_t block) {
  use(block) = {.tables = 0, .older = newest_, .newer = -1};
  (newest_ >= 0 ? use(newest_).newer : oldest_) = block;
  newest_ = block;
  ++idle_;
}

void BlockPool::remove_idle(int32_t block) {
  const Use u = use(block);
  (u.older >= 0 ? use(u.older).newer : oldest_) = u.newer;
  (u.newer >= 0 ? use(u.newer).older : newest_) = u.older;
  --idle_;
}

}  // namespace phalanx::engine
