#include "phalanx/layers/memory.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "phalanx/base/error.h"

namespace phalanx::layers {

Memory::Memory(int64_t bytes, const char* what) : bytes_(bytes) {
  if (bytes == 0) return;
  void* at = ::mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED)
    throw Error(Code::kResourceExhausted, fmt::format("cannot map {} bytes for {}: {}", bytes, what,
                                                      std::strerror(errno)));
  (void)::madvise(at, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  data_ = static_cast<std::byte*>(at);
}

Memory::Memory(Memory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Memory::~Memory() {
  if (data_ != nullptr) ::munmap(data_, static_cast<size_t>(bytes_));
}

tensor::MatrixView Carver::matrix(int64_t rows, int64_t cols, tensor::DType dtype) {
  constexpr int64_t kAlignment = 64;
  std::byte* at = base_ == nullptr ? nullptr : base_ + used_;
  const int64_t bytes = rows * cols * static_cast<int64_t>(tensor::dtype_bytes(dtype));
  used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return {.data = at, .dtype = dtype, .rows = rows, .cols = cols, .stride = cols};
}

}  // namespace phalanx::layers
