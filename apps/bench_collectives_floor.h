#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "phalanx/base/unique_fd.h"

// The least that any implementation must do, without frames, faults, deadlines or pieces: what the
// bench compares with. Symmetric exchanges among `size` ranks.
class Floor {
 public:
  virtual ~Floor() = default;
  // blocks[r] holds rank r's `bytes` bytes; own is filled on entry, all on return.
  virtual void all_gather(std::span<std::byte* const> blocks, int64_t bytes) = 0;
  // values[i] becomes the sum over ranks, in rank order.
  virtual void all_reduce(std::span<float> values) = 0;
};

// One flag and two whole-message slots per rank in memory that all ranks map.
class ShmFloor final : public Floor {
 public:
  struct alignas(128) Flag {
    std::atomic<uint32_t> rounds{0};
  };
  static size_t bytes_for(int size, int64_t max_bytes);
  ShmFloor(void* memory, int rank, int size, int64_t max_bytes);
  void all_gather(std::span<std::byte* const> blocks, int64_t bytes) override;
  void all_reduce(std::span<float> values) override;

 private:
  std::byte* slot(int rank) { return slots_ + (2 * rank + (round_ & 1)) * max_bytes_; }
  void publish(const std::byte* data, int64_t bytes);
  void await(int rank);

  Flag* flags_;
  std::byte* slots_;
  int rank_, size_;
  int64_t max_bytes_;
  uint32_t round_ = 0;
  std::vector<const float*> sources_;
};

// Non-blocking TCP sockets, TCP_NODELAY, spin 50 us then poll.
class TcpFloor final : public Floor {
 public:
  // Connects to `ports` of `addresses` for lower ranks, accepts on `listener` from higher ones.
  TcpFloor(int listener, const std::vector<std::string>& addresses,
           const std::vector<uint16_t>& ports, int rank);
  void all_gather(std::span<std::byte* const> blocks, int64_t bytes) override;
  void all_reduce(std::span<float> values) override;

 private:
  std::vector<phalanx::UniqueFd> peers_;  // by rank
  int rank_;
  std::vector<int64_t> sent_, received_;
  std::vector<std::byte> scratch_;
  std::vector<std::byte*> blocks_;
  std::vector<const float*> sources_;
};
