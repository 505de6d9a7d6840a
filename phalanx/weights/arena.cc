#include "phalanx/weights/arena.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
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

UniqueFd create_arena_memory() {
  UniqueFd fd(::memfd_create("phalanx-weights", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid())
    throw Error(Code::kResourceExhausted,
                fmt::format("cannot make memory for weights: {}", std::strerror(errno)));
  return fd;
}

bool arena_is_sealed(int memory) {
  const int seals = ::fcntl(memory, F_GET_SEALS);
  return seals >= 0 && (seals & F_SEAL_FUTURE_WRITE) != 0;
}

Arena::Arena(int64_t bytes, int memory) : bytes_(bytes) {
  PHALANX_CHECK(bytes >= 0 && bytes <= INT64_MAX - 2 * kHugePage);
  // Only aligned ranges can be huge: reserve more, keep the aligned part.
  mapped_ = std::max<int64_t>(1, (bytes + kHugePage - 1) / kHugePage) * kHugePage;
  if (memory < 0) {
    fd_ = create_arena_memory();
  } else {
    fd_.reset(::fcntl(memory, F_DUPFD_CLOEXEC, 0));
  }
  filled_ = arena_is_sealed(fd_.get());
  struct stat info {};
  if (filled_ && ::fstat(fd_.get(), &info) == 0 && info.st_size != mapped_)
    throw Error(Code::kFailedPrecondition,
                fmt::format("the kept weights of this rank have {} bytes, expected {}: they were "
                            "packed for another cut or model",
                            info.st_size, mapped_));
  void* at = MAP_FAILED;
  if (fd_.valid() && (filled_ || ::ftruncate(fd_.get(), mapped_) == 0))
    at = ::mmap(nullptr, static_cast<size_t>(mapped_ + kHugePage), PROT_NONE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at != MAP_FAILED) {
    const auto begin = reinterpret_cast<uintptr_t>(at);
    const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = begin + static_cast<uintptr_t>(mapped_ + kHugePage);
    if (aligned > begin) ::munmap(at, aligned - begin);
    const uintptr_t own_end = aligned + static_cast<uintptr_t>(mapped_);
    if (end > own_end) ::munmap(reinterpret_cast<void*>(own_end), end - own_end);
    at = ::mmap(reinterpret_cast<void*>(aligned), static_cast<size_t>(mapped_),
                filled_ ? PROT_READ : PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd_.get(), 0);
    if (at == MAP_FAILED)
      ::munmap(reinterpret_cast<void*>(aligned), static_cast<size_t>(mapped_));
  }
  if (at == MAP_FAILED)
    throw Error(Code::kResourceExhausted,
                fmt::format("cannot map {} bytes for the weights of this rank: {}", mapped_,
                            std::strerror(errno)));
  data_ = static_cast<std::byte*>(at);
}

Arena::~Arena() { ::munmap(data_, static_cast<size_t>(mapped_)); }

bool Arena::take_huge_pages(ThreadPool& pool) {
  const int64_t pages = mapped_ / kHugePage;
  std::atomic<bool> all{true};
  pool.run([&](int thread) {
    const int64_t begin = pages * thread / pool.size() * kHugePage;
    const int64_t end = pages * (thread + 1) / pool.size() * kHugePage;
    if (begin == end) return;
    std::byte* const at = data_ + begin;
    const auto bytes = static_cast<size_t>(end - begin);
    (void)::madvise(at, bytes, MADV_HUGEPAGE);
    // A range without any page cannot be collapsed.
    for (int64_t page = begin; page < end; page += kHugePage) data_[page] = std::byte{0};
    // In one call: each waits for every processor of the machine once.
    if (::madvise(at, bytes, MADV_COLLAPSE) != 0) all.store(false, std::memory_order_relaxed);
  });
  return all.load(std::memory_order_relaxed);
}

void Arena::seal() {
  if (::mprotect(data_, static_cast<size_t>(mapped_), PROT_READ) != 0 ||
      ::fcntl(fd_.get(), F_ADD_SEALS,
              F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) != 0)
    throw Error(Code::kInternal,
                fmt::format("cannot seal the weights of this rank: {}", std::strerror(errno)));
}

}  // namespace phalanx::weights
