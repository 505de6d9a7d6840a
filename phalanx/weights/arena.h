#pragma once

#include <cstddef>
#include <cstdint>

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

  [[nodiscard]] std::byte* data() const { return data_; }  // page-aligned
  [[nodiscard]] int64_t bytes() const { return bytes_; }
  [[nodiscard]] int fd() const { return fd_.get(); }  // lent; close-on-exec

  // Asks for huge pages for what has been written. Best effort; false where the kernel refuses.
  bool collapse();
  // From now on read-only, in every mapping yet to be made too. Throws Error(kInternal).
  void seal();

 private:
  UniqueFd fd_;
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
  int64_t mapped_ = 0;
};

}  // namespace phalanx::weights
