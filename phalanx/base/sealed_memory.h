#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "phalanx/base/unique_fd.h"

namespace phalanx {

// A zeroed memfd of fixed size (F_SEAL_GROW, F_SEAL_SHRINK, F_SEAL_SEAL), CLOEXEC. `name` is only
// seen in /proc. Throws Error(kResourceExhausted) naming the size and errno.
[[nodiscard]] UniqueFd create_sealed_memory(const std::string& name, int64_t bytes);

// A shared, writable mapping of such a memfd, unmapped at destruction. Moves, does not copy.
class SealedMapping {
 public:
  SealedMapping() = default;
  // Throws Error(kFailedPrecondition) when `fd` is not a memfd of exactly `bytes` that can no
  // longer shrink (touching pages that went away would be SIGBUS). `what` is named in the message.
  SealedMapping(int fd, int64_t bytes, const std::string& what);
  ~SealedMapping();
  SealedMapping(SealedMapping&& other) noexcept;
  SealedMapping& operator=(SealedMapping&& other) noexcept;

  [[nodiscard]] std::byte* data() const { return data_; }
  [[nodiscard]] int64_t size() const { return size_; }
  // Gives the mapping up without unmapping it.
  std::byte* release();

 private:
  std::byte* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace phalanx
