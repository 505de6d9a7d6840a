#pragma once

#include <cstddef>
#include <cstdint>

#include "phalanx/base/thread_pool.h"
#include "phalanx/base/unique_fd.h"

namespace phalanx::weights {

// The packed weights of one rank in one memfd, so that whoever holds the descriptor keeps them when
// the rank dies. Zeroed; a page gets memory when it is first touched.
class Arena {
 public:
  // Throws Error(kResourceExhausted) with the size when the system refuses.
  explicit Arena(int64_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  [[nodiscard]] std::byte* data() const { return data_; }  // aligned to huge pages
  [[nodiscard]] int64_t bytes() const { return bytes_; }
  [[nodiscard]] int fd() const { return fd_.get(); }  // lent; close-on-exec

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
};

}  // namespace phalanx::weights
