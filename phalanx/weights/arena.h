#pragma once

#include <cstddef>
#include <cstdint>

#include "phalanx/base/thread_pool.h"
#include "phalanx/base/unique_fd.h"

namespace phalanx::weights {

// An empty memfd that an Arena can take as its memory; CLOEXEC. Throws Error(kResourceExhausted).
[[nodiscard]] UniqueFd create_arena_memory();
// Whether an Arena in this memory was filled and sealed: what lies in it is whole.
[[nodiscard]] bool arena_is_sealed(int memory);

// The packed weights of one rank in one memfd, so that whoever holds the descriptor keeps them when
// the rank dies. Zeroed; a page gets memory when it is first touched.
class Arena {
 public:
  // memory: from create_arena_memory(), lent for this call; -1: one of its own. Sealed memory is
  // mapped read-only as it is. Throws Error(kResourceExhausted) with the size when the system
  // refuses, Error(kFailedPrecondition) when sealed memory has another size.
  explicit Arena(int64_t bytes, int memory = -1);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  [[nodiscard]] std::byte* data() const { return data_; }  // aligned to huge pages
  [[nodiscard]] int64_t bytes() const { return bytes_; }
  [[nodiscard]] int fd() const { return fd_.get(); }  // lent; close-on-exec
  // The memory was sealed before: the weights are there, and nothing may be written.
  [[nodiscard]] bool filled() const { return filled_; }

  // Takes all of the memory now, in huge pages: before packing, so that nothing is copied and few
  // pages fault; on all threads, because the system clears it first. Best effort; false where some
  // lies in small pages.
  bool take_huge_pages(ThreadPool& pool);
  // From now on read-only, in every mapping yet to be made too. Throws Error(kInternal).
  void seal();

 private:
  UniqueFd fd_;
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
  int64_t mapped_ = 0;
  bool filled_ = false;
};

}  // namespace phalanx::weights
