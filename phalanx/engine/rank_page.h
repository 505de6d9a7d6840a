#pragma once

#include <atomic>
#include <cstdint>

#include "phalanx/base/sealed_memory.h"
#include "phalanx/base/unique_fd.h"

namespace phalanx::engine {

// A page each rank owns and its supervisor reads: what it is doing, and how its time was spent.
// In a memfd of its own; written by the rank only, with relaxed stores.
struct RankPage {
  std::atomic<uint64_t> generation{0};
  std::atomic<uint64_t> step{0};              // last step begun
  std::atomic<uint64_t> steps_done{0};
  std::atomic<uint64_t> tokens_done{0};       // tokens computed (prompt and output)
  std::atomic<uint64_t> compute_ns{0};
  std::atomic<uint64_t> transfer_ns{0};       // on the wire and in copies
  std::atomic<uint64_t> wait_ns{0};           // for peers
  std::atomic<uint64_t> bytes_sent{0};
  std::atomic<uint64_t> bytes_received{0};
  std::atomic<uint64_t> bytes_shared{0};
  std::atomic<uint64_t> bytes_read{0};        // from disk, so far
  std::atomic<uint64_t> bytes_to_read{0};
  std::atomic<uint64_t> weight_bytes{0};
  std::atomic<uint64_t> kv_bytes{0};
  std::atomic<uint64_t> heartbeat{0};         // rises while the rank's threads make progress
};
static_assert(sizeof(RankPage) <= 4096 && std::atomic<uint64_t>::is_always_lock_free);

[[nodiscard]] UniqueFd create_rank_page();
// Maps it; unmapped at process end. Throws Error.
[[nodiscard]] RankPage* map_rank_page(int fd);
// The same for whoever outlives the rank: unmapped with `mapping`.
[[nodiscard]] RankPage* map_rank_page(int fd, SealedMapping& mapping);

}  // namespace phalanx::engine
