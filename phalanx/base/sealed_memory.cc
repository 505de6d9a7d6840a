#include "phalanx/base/sealed_memory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "phalanx/base/error.h"

namespace phalanx {

UniqueFd create_sealed_memory(const std::string& name, int64_t bytes) {
  UniqueFd fd(::memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid() || ::ftruncate(fd.get(), bytes) != 0 ||
      ::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) != 0) {
    throw Error(Code::kResourceExhausted,
                fmt::format("cannot create {} bytes of shared memory for '{}': {}", bytes, name,
                            std::strerror(errno)));
  }
  return fd;
}

SealedMapping::SealedMapping(int fd, int64_t bytes, const std::string& what) {
  struct stat info {};
  if (::fstat(fd, &info) != 0) {
    throw Error(Code::kFailedPrecondition, fmt::format("{}: descriptor {} cannot be used: {}", what,
                                                       fd, std::strerror(errno)));
  }
  if (info.st_size != bytes) {
    throw Error(Code::kFailedPrecondition,
                fmt::format("{}: the shared memory has {} bytes, expected {}; both sides must be "
                            "started with the same limits",
                            what, info.st_size, bytes));
  }
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    throw Error(Code::kFailedPrecondition,
                fmt::format("{}: descriptor {} is not a sealed memfd", what, fd));
  }
  void* address = ::mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED,
                         fd, 0);
  if (address == MAP_FAILED) {
    throw Error(Code::kResourceExhausted, fmt::format("{}: cannot map {} bytes: {}", what, bytes,
                                                      std::strerror(errno)));
  }
  data_ = static_cast<std::byte*>(address);
  size_ = bytes;
}

SealedMapping::~SealedMapping() {
  if (data_ != nullptr) ::munmap(data_, static_cast<size_t>(size_));
}

SealedMapping::SealedMapping(SealedMapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

SealedMapping& SealedMapping::operator=(SealedMapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

std::byte* SealedMapping::release() {
  size_ = 0;
  return std::exchange(data_, nullptr);
}

}  // namespace phalanx
