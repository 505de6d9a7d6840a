#include "phalanx/engine/prefix_index.h"

#include <algorithm>
#include <bit>
#include <random>

#include "phalanx/base/check.h"

namespace phalanx::engine {

PrefixIndex::PrefixIndex(int64_t blocks, int64_t block_size)
    : block_size_(block_size),
      entries_(static_cast<size_t>(blocks)),
      tokens_(static_cast<size_t>(blocks * block_size)),
      buckets_(std::bit_ceil(static_cast<size_t>(blocks)), -1) {
  std::random_device device;
  seed_ = uint64_t{device()} << 32 | device();
}

size_t PrefixIndex::bucket(uint64_t parent, std::span<const int32_t> tokens) const {
  uint64_t hash = seed_ ^ (parent * 0x9E3779B97F4A7C15u);
  for (const int32_t token : tokens) {
    hash = (hash ^ static_cast<uint32_t>(token)) * 0xBF58476D1CE4E5B9u;
    hash ^= hash >> 29;
  }
  return static_cast<size_t>(hash) & (buckets_.size() - 1);
}

int32_t PrefixIndex::find(uint64_t parent, std::span<const int32_t> tokens) const {
  int32_t block = buckets_[bucket(parent, tokens)];
  while (block >= 0) {
    const Entry& e = entry(block);
    if (e.parent == parent && std::ranges::equal(tokens_of(block), tokens)) break;
    block = e.next;
  }
  return block;
}

int32_t PrefixIndex::insert(uint64_t parent, std::span<const int32_t> tokens, int32_t block) {
  PHALANX_CHECK(static_cast<int64_t>(tokens.size()) == block_size_ && !contains(block));
  const int32_t known = find(parent, tokens);
  if (known >= 0) return known;
  int32_t& first = buckets_[bucket(parent, tokens)];
  entries_[static_cast<size_t>(block)] = {.id = ++last_id_, .parent = parent, .next = first};
  std::ranges::copy(tokens, tokens_.begin() + block * block_size_);
  first = block;
  return block;
}

void PrefixIndex::erase(int32_t block) {
  const Entry& e = entry(block);
  PHALANX_CHECK(e.id != 0);
  int32_t* link = &buckets_[bucket(e.parent, tokens_of(block))];
  while (*link != block) link = &entries_[static_cast<size_t>(*link)].next;
  *link = e.next;
  entries_[static_cast<size_t>(block)] = {};
}

}  // namespace phalanx::engine
