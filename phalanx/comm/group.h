#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace phalanx::comm {

// Counted since the group was formed; read by the owner's thread.
struct GroupStats {
  uint64_t operations = 0;
  uint64_t bytes_sent = 0;      // on sockets between nodes (payload)
  uint64_t bytes_received = 0;  // on sockets between nodes (payload)
  uint64_t bytes_shared = 0;    // copied through shared memory within the node
  uint64_t wait_ns = 0;         // waiting for a peer that has not arrived yet
  uint64_t transfer_ns = 0;     // everything else inside collectives
};

// Ordered collectives among size() ranks. All ranks call the same operations with the same sizes
// in the same order, from one thread each. A group of one does nothing, correctly.
//
// Every operation throws Error(kUnavailable) that names the rank and host at fault when a peer is
// lost, Error(kDeadlineExceeded) when a peer does not arrive by the group's cap, Error(kAborted)
// after abort(). After any throw the group is dead on this rank and, soon, on all.
class Group {
 public:
  virtual ~Group() = default;
  [[nodiscard]] virtual int rank() const = 0;
  [[nodiscard]] virtual int size() const = 0;

  // In place. `matrix` is [rows][sum(row_bytes)] without gaps; rank r's columns are the
  // row_bytes[r] bytes that follow those of ranks 0..r-1, and hold this rank's data on entry. On
  // return every column is filled. rows == 1 is the plain all_gather_v. row_bytes may hold zeros.
  virtual void all_gather(std::byte* matrix, int64_t rows,
                          std::span<const int64_t> row_bytes) = 0;
  // As all_gather, but only `root` needs the result. On root `matrix` is the whole matrix. On
  // others it is their own columns only, without gaps: [rows][row_bytes[rank()]].
  virtual void gather(std::byte* matrix, int64_t rows, std::span<const int64_t> row_bytes,
                      int root) = 0;
  virtual void broadcast(std::span<std::byte> bytes, int root) = 0;
  // Element-wise sum in ascending rank order, the same bits on every rank.
  virtual void all_reduce(std::span<float> values) = 0;
  virtual void barrier() = 0;

  // From any thread; wakes every waiter on every rank of the group. `reason` ends up in the errors.
  virtual void abort(const char* reason) noexcept = 0;

  [[nodiscard]] virtual GroupStats stats() const = 0;
};

}  // namespace phalanx::comm
