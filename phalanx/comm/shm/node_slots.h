#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "phalanx/comm/fault.h"
#include "phalanx/comm/frame.h"
#include "phalanx/comm/region.h"
#include "phalanx/comm/shm/node_memory.h"

namespace phalanx::comm {

// Collectives among the ranks of one node over their shared memory. Ranks are local indices here.
//
// Everything is a sequence of rounds, the same on all local ranks. A rank begins round r once all
// others have begun r - 1, that is, have finished r - 2: so the slot of r - 2 is free, and two
// slots per rank are enough with one flag. Beginning says "my slot holds my data of round r".
// One thread.
class NodeSlots {
 public:
  struct Stats {
    uint64_t bytes_shared = 0;
    uint64_t wait_ns = 0;
  };

  // `names` by local index, for messages. `memory` and `watch` must outlive this.
  NodeSlots(NodeMemory* memory, int local, int spin_us, std::vector<std::string> names,
            std::vector<int> ranks, Watch* watch);

  void begin(Operation operation, uint64_t sequence);
  // streams[l]: the bytes that rank l has and all others want.
  void all_gather(std::span<const std::vector<Region>> streams);
  // As above, but only `root` wants them. On the others only their own stream matters: the rest
  // must have the right sizes.
  void gather(std::span<const std::vector<Region>> streams, int root);
  void broadcast(std::span<std::byte> bytes, int root);
  // Sum in ascending local order.
  void all_reduce(std::span<float> values);
  // Publishes `own` piece by piece and hands out each piece of all ranks: sources[l] is rank l's
  // `count` values from `offset` on, valid during the call.
  using ReducePiece =
      std::function<void(int64_t offset, int64_t count, std::span<const float* const> sources)>;
  void publish_pieces(std::span<const float> own, const ReducePiece& reduce);
  // Returns when all have called it.
  void meet();

  [[nodiscard]] const Stats& stats() const { return stats_; }

 private:
  std::byte* own_slot() { return memory_->slot(local_, round_); }
  void open(int64_t bytes);  // waits until the slot of this round is free
  void post();               // its data is there
  void wait(int peer, uint32_t rounds);
  void wait_slowly(int peer, uint32_t rounds);
  const std::byte* peer_slot(int peer);  // waits for its data of this round
  void one_shot(std::span<float> values);
  void two_shot(std::span<float> values);

  NodeMemory* memory_;
  int local_;
  int count_;
  int64_t spin_ns_;
  std::vector<std::string> names_;
  std::vector<int> ranks_;
  Watch* watch_;
  uint32_t round_ = 0;             // the round being worked on
  uint64_t tag_ = 0;
  uint64_t operation_tag_ = 0;
  std::vector<uint32_t> begun_;    // by local index: rounds seen begun
  std::vector<RegionCursor> cursors_;
  std::vector<const float*> sources_;
  Stats stats_;
};

}  // namespace phalanx::comm
