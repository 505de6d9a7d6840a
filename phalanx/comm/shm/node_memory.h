#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "phalanx/base/unique_fd.h"
#include "phalanx/comm/fault.h"

namespace phalanx::comm {

// Layout of the memory shared by the ranks of one node: a header, one line and one info block per
// rank, then two slots per rank. Zeroes from the kernel are a valid start. docs/wire.md.
struct NodeHeader {
  uint64_t magic;
  uint32_t version;
  uint32_t local_ranks;
  uint64_t slot_bytes;
  uint64_t total_bytes;
  // The fault that ended the group: whoever moves the state from 0 to 1 writes it, then stores 2.
  alignas(64) std::atomic<uint32_t> abort_state;
  int32_t code;
  int32_t culprit;
  char text[468];
};

// Written by its rank at every round, read by the others.
struct alignas(128) RankLine {
  std::atomic<uint32_t> word;  // rounds begun << 1 | somebody sleeps on this word
  uint64_t tags[2];            // what the rank calls, by round parity
};

enum class RankState : uint32_t { kAbsent = 0, kJoined = 1, kLeft = 2 };

struct alignas(128) RankInfo {
  std::atomic<uint32_t> state;
  int32_t rank;
  int32_t pid;
  uint64_t generation;
};

inline constexpr uint64_t kNodeMagic = 0x45444F4E584C4850;  // "PHLXNODE"
inline constexpr int kMaxLocalRanks = 256;

// Sleeps while *word == seen, at most `slice_ms`. Works between processes.
void futex_wait(std::atomic<uint32_t>* word, uint32_t seen, int slice_ms);
void futex_wake_all(std::atomic<uint32_t>* word);

// A mapping of the memory that create_node_memory() made. Any thread may call abort() and fault().
class NodeMemory {
 public:
  // Maps and checks it (seals, sizes, version, number of ranks). Throws Error(kFailedPrecondition).
  NodeMemory(int fd, int local_ranks);
  ~NodeMemory();
  NodeMemory(const NodeMemory&) = delete;
  NodeMemory& operator=(const NodeMemory&) = delete;

  [[nodiscard]] int local_ranks() const { return local_ranks_; }
  [[nodiscard]] int64_t slot_bytes() const { return slot_bytes_; }
  [[nodiscard]] RankLine& line(int local) { return lines_[local]; }
  [[nodiscard]] RankInfo& info(int local) { return infos_[local]; }
  [[nodiscard]] std::byte* slot(int local, uint32_t round) {
    return slots_ + (int64_t{2} * local + (round & 1)) * slot_bytes_;
  }

  // The first fault of the node stays. Wakes all sleepers.
  void abort(const Fault& fault) noexcept;
  [[nodiscard]] bool aborted() const {
    return header_->abort_state.load(std::memory_order_acquire) != 0;
  }
  [[nodiscard]] std::optional<Fault> fault() const;

  // 4 MiB: most messages fit, so that they cost one meeting, and pages that no message has needed
  // take no memory. With pieces that stay in a private cache, large messages were 1.4 times slower
  // between cores of different caches and 1.4 times faster between cores that share one.
  static constexpr int64_t kSlotBytes = 4 << 20;
  static UniqueFd create(int local_ranks, int64_t slot_bytes);

 private:
  std::byte* base_ = nullptr;
  int64_t total_bytes_ = 0;
  int64_t slot_bytes_ = 0;
  int local_ranks_ = 0;
  NodeHeader* header_ = nullptr;
  RankLine* lines_ = nullptr;
  RankInfo* infos_ = nullptr;
  std::byte* slots_ = nullptr;
};

}  // namespace phalanx::comm
