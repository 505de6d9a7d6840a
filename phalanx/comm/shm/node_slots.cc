#include "phalanx/comm/shm/node_slots.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "phalanx/base/clock.h"
#include "phalanx/comm/sum.h"

namespace phalanx::comm {

namespace {

constexpr int kSliceMs = 50;              // longest sleep without looking around
constexpr int64_t kTwoShotBytes = 128 << 10;  // from here, with 3 ranks or more

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline bool reached(uint32_t begun, uint32_t rounds) {
  return static_cast<int32_t>((begun - rounds) << 1) >= 0;  // 31 bits that wrap
}

}  // namespace

NodeSlots::NodeSlots(NodeMemory* memory, int local, int spin_us, std::vector<std::string> names,
                     std::vector<int> ranks, Watch* watch)
    : memory_(memory),
      local_(local),
      count_(memory->local_ranks()),
      spin_ns_(int64_t{spin_us} * 1000),
      names_(std::move(names)),
      ranks_(std::move(ranks)),
      watch_(watch),
      begun_(count_),
      cursors_(count_),
      sources_(count_) {}

void NodeSlots::begin(Operation operation, uint64_t sequence) {
  operation_tag_ = static_cast<uint64_t>(operation) << 56 | (sequence & 0xffffff) << 32;
}

void NodeSlots::open(int64_t bytes) {
  for (int peer = 0; peer < count_; ++peer)
    if (peer != local_) wait(peer, round_);
  tag_ = operation_tag_ | (static_cast<uint64_t>(bytes) & 0xffffffff);
}

void NodeSlots::post() {
  RankLine& line = memory_->line(local_);
  line.tags[round_ & 1] = tag_;
  const uint32_t before = line.word.exchange((round_ + 1) << 1, std::memory_order_acq_rel);
  if (before & 1) futex_wake_all(&line.word);
}

void NodeSlots::wait(int peer, uint32_t rounds) {
  if (reached(begun_[peer], rounds)) return;
  const uint32_t word = memory_->line(peer).word.load(std::memory_order_acquire);
  begun_[peer] = word >> 1;
  if (!reached(begun_[peer], rounds)) wait_slowly(peer, rounds);
}

void NodeSlots::wait_slowly(int peer, uint32_t rounds) {
  std::atomic<uint32_t>& word = memory_->line(peer).word;
  const int64_t start = now_ns();
  for (;;) {
    for (int i = 0; i < 16; ++i) {
      const uint32_t seen = word.load(std::memory_order_acquire);
      begun_[peer] = seen >> 1;
      if (reached(begun_[peer], rounds)) {
        stats_.wait_ns += static_cast<uint64_t>(now_ns() - start);
        return;
      }
      pause();
    }
    if (watch_->aborted()) watch_->check(ranks_[peer]);
    const int64_t now = now_ns();
    if (now - start < spin_ns_) continue;
    watch_->check(ranks_[peer]);
    const bool left = memory_->info(peer).state.load(std::memory_order_acquire) ==
                      static_cast<uint32_t>(RankState::kLeft);
    uint32_t seen = word.load(std::memory_order_acquire);
    if (reached(seen >> 1, rounds)) continue;
    if (left)
      throw FaultError({Code::kUnavailable, ranks_[peer],
                        fmt::format("{} lost: it left the group (noticed by {} in {})",
                                    names_[peer], names_[local_],
                                    operation_name(static_cast<Operation>(tag_ >> 56)))});
    if ((seen & 1) == 0 &&
        !word.compare_exchange_strong(seen, seen | 1, std::memory_order_acq_rel))
      continue;
    futex_wait(&word, seen | 1, kSliceMs);
  }
}

const std::byte* NodeSlots::peer_slot(int peer) {
  wait(peer, round_ + 1);
  const uint64_t tag = memory_->line(peer).tags[round_ & 1];
  if (tag != tag_) [[unlikely]]
    throw FaultError(
        {Code::kInternal, ranks_[peer],
         fmt::format("{} called {} #{} of {} bytes while {} called {} #{} of {} bytes (numbers "
                     "modulo 2^24, sizes modulo 2^32). All ranks must call the same collectives in "
                     "the same order",
                     names_[peer], operation_name(static_cast<Operation>(tag >> 56)),
                     (tag >> 32) & 0xffffff, tag & 0xffffffff, names_[local_],
                     operation_name(static_cast<Operation>(tag_ >> 56)), (tag_ >> 32) & 0xffffff,
                     tag_ & 0xffffffff)});
  return memory_->slot(peer, round_);
}

void NodeSlots::all_gather(std::span<const std::vector<Region>> streams) {
  const int64_t slot = memory_->slot_bytes();
  int64_t longest = 0, total = 0;
  for (int peer = 0; peer < count_; ++peer) {
    cursors_[peer] = RegionCursor(streams[peer]);
    longest = std::max(longest, cursors_[peer].left());
    total += cursors_[peer].left();
  }
  for (int64_t at = 0; at < longest; at += slot, ++round_) {
    open(total);
    const int64_t own = std::min(slot, cursors_[local_].left());
    cursors_[local_].copy_to(own_slot(), own);
    post();
    stats_.bytes_shared += static_cast<uint64_t>(own);
    for (int step = 1; step < count_; ++step) {
      const int peer = (local_ + step) % count_;
      const int64_t count = std::min(slot, cursors_[peer].left());
      if (count == 0) continue;
      cursors_[peer].copy_from(peer_slot(peer), count);
      stats_.bytes_shared += static_cast<uint64_t>(count);
    }
  }
}

void NodeSlots::gather(std::span<const std::vector<Region>> streams, int root) {
  const int64_t slot = memory_->slot_bytes();
  int64_t longest = 0, total = 0;
  for (int peer = 0; peer < count_; ++peer) {
    cursors_[peer] = RegionCursor(streams[peer]);
    total += cursors_[peer].left();
    if (peer != root) longest = std::max(longest, cursors_[peer].left());
  }
  for (int64_t at = 0; at < longest; at += slot, ++round_) {
    open(total);
    if (local_ != root) {
      const int64_t own = std::min(slot, cursors_[local_].left());
      cursors_[local_].copy_to(own_slot(), own);
      post();
      stats_.bytes_shared += static_cast<uint64_t>(own);
      continue;
    }
    post();
    for (int peer = 0; peer < count_; ++peer) {
      const int64_t count = peer == root ? 0 : std::min(slot, cursors_[peer].left());
      if (count == 0) continue;
      cursors_[peer].copy_from(peer_slot(peer), count);
      stats_.bytes_shared += static_cast<uint64_t>(count);
    }
  }
}

void NodeSlots::broadcast(std::span<std::byte> bytes, int root) {
  const int64_t slot = memory_->slot_bytes();
  const auto size = static_cast<int64_t>(bytes.size());
  for (int64_t at = 0; at < size; at += slot, ++round_) {
    const int64_t count = std::min(slot, size - at);
    open(size);
    if (local_ == root) {
      std::memcpy(own_slot(), bytes.data() + at, count);
      post();
    } else {
      post();
      std::memcpy(bytes.data() + at, peer_slot(root), count);
    }
    stats_.bytes_shared += static_cast<uint64_t>(count);
  }
}

void NodeSlots::all_reduce(std::span<float> values) {
  if (count_ >= 3 && static_cast<int64_t>(values.size_bytes()) >= kTwoShotBytes) {
    two_shot(values);
  } else {
    one_shot(values);
  }
}

void NodeSlots::publish_pieces(std::span<const float> own, const ReducePiece& reduce) {
  const int64_t slot = memory_->slot_bytes() / static_cast<int64_t>(sizeof(float));
  const auto size = static_cast<int64_t>(own.size());
  for (int64_t at = 0; at < size; at += slot, ++round_) {
    const int64_t count = std::min(slot, size - at);
    open(static_cast<int64_t>(own.size_bytes()));
    std::memcpy(own_slot(), own.data() + at, count * sizeof(float));
    post();
    stats_.bytes_shared += static_cast<uint64_t>(count) * sizeof(float) * count_;
    for (int step = 1; step < count_; ++step) {
      const int peer = (local_ + step) % count_;
      sources_[peer] = reinterpret_cast<const float*>(peer_slot(peer));
    }
    sources_[local_] = own.data() + at;
    reduce(at, count, sources_);
  }
}

void NodeSlots::one_shot(std::span<float> values) {
  publish_pieces(values, [&](int64_t at, int64_t count, std::span<const float* const> sources) {
    sum_in_order(values.data() + at, sources, count);
  });
}

void NodeSlots::two_shot(std::span<float> values) {
  const int64_t slot = memory_->slot_bytes() / static_cast<int64_t>(sizeof(float));
  const auto size = static_cast<int64_t>(values.size());
  std::vector<const float*> mine(count_);
  for (int64_t at = 0; at < size; at += slot) {
    const int64_t count = std::min(slot, size - at);
    const auto share = [&](int local) { return count * local / count_; };
    float* const piece = values.data() + at;
    open(static_cast<int64_t>(values.size_bytes()));
    std::memcpy(own_slot(), piece, count * sizeof(float));
    post();
    for (int step = 0; step < count_; ++step) {
      const int peer = (local_ + step) % count_;
      mine[peer] =
          (peer == local_ ? piece : reinterpret_cast<const float*>(peer_slot(peer))) +
          share(local_);
    }
    ++round_;
    open(static_cast<int64_t>(values.size_bytes()));
    const int64_t own = share(local_ + 1) - share(local_);
    auto* const result = reinterpret_cast<float*>(own_slot());
    sum_in_order(result, mine, own);
    post();
    std::memcpy(piece + share(local_), result, own * sizeof(float));
    for (int step = 1; step < count_; ++step) {
      const int peer = (local_ + step) % count_;
      std::memcpy(piece + share(peer), peer_slot(peer),
                  (share(peer + 1) - share(peer)) * sizeof(float));
    }
    ++round_;
    stats_.bytes_shared += static_cast<uint64_t>(count) * sizeof(float) * 3;
  }
}

void NodeSlots::meet() {
  open(0);
  post();
  for (int step = 1; step < count_; ++step) peer_slot((local_ + step) % count_);
  ++round_;
}

}  // namespace phalanx::comm
