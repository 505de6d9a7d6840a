#include "phalanx/weights/arena.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "phalanx/base/check.h"
#include "phalanx/base/error.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // since Linux 6.1, not yet in this libc
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

namespace phalanx::weights {
namespace {

constexpr int64_t kHugePage = 2 << 20;

}  // namespace

Arena::Arena(int64_t bytes) : bytes_(bytes) {
  PHALANX_CHECK(bytes >= 0);
  mapped_ = std::max<int64_t>(1, (bytes + kHugePage - 1) / kHugePage) * kHugePage;
  fd_.reset(::memfd_create("phalanx-weights", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  void* at = MAP_FAILED;
  if (fd_.valid() && ::ftruncate(fd_.get(), mapped_) == 0)
    at = ::mmap(nullptr, static_cast<size_t>(mapped_), PROT_READ | PROT_WRITE, MAP_SHARED,
                fd_.get(), 0);
  if (at == MAP_FAILED)
    throw Error(Code::kResourceExhausted,
                fmt::format("cannot map {} bytes for the weights of this rank: {}", mapped_,
                            std::strerror(errno)));
  data_ = static_cast<std::byte*>(at);
  (void)::madvise(at, static_cast<size_t>(mapped_), MADV_HUGEPAGE);
}

Arena::~Arena() { ::munmap(data_, static_cast<size_t>(mapped_)); }

bool Arena::collapse() {
  return ::madvise(data_, static_cast<size_t>(mapped_), MADV_COLLAPSE) == 0;
}

void Arena::seal() {
  if (::mprotect(data_, static_cast<size_t>(mapped_), PROT_READ) != 0 ||
      ::fcntl(fd_.get(), F_ADD_SEALS,
              F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) != 0)
    throw Error(Code::kInternal,
                fmt::format("cannot seal the weights of this rank: {}", std::strerror(errno)));
}

}  // namespace phalanx::weights
