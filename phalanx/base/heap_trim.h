#pragma once

#include <cstdint>

namespace phalanx {

// Gives the memory back that a rush of work left free in the allocator: glibc keeps what lies between
// blocks still in use, so a server that had 1,000 connections would look as if it still had them.
// One thread.
class HeapTrim {
 public:
  // To be called now and then while there is nothing to do. Trims (milliseconds) only if this
  // process's own memory has grown by kGrowthBytes since it last did.
  void when_idle();

  static constexpr int64_t kGrowthBytes = 4 << 20;

 private:
  int64_t own_bytes_ = 0;  // after the last trim
};

// Resident memory of this process that it shares with no file and no other process.
[[nodiscard]] int64_t own_resident_bytes();

}  // namespace phalanx
