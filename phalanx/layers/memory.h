#pragma once

#include <cstddef>
#include <cstdint>

#include "phalanx/tensor/tensor_view.h"

namespace phalanx::layers {

// Anonymous memory, zeroed, 64-aligned or better, that lives as long as the object. Pages get
// memory when they are first touched; huge pages are asked for.
class Memory {
 public:
  Memory() = default;
  // Throws Error(kResourceExhausted) naming `what` and the size.
  Memory(int64_t bytes, const char* what);
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  ~Memory();

  [[nodiscard]] std::byte* data() const { return data_; }
  [[nodiscard]] int64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Hands out matrices one after the other from lent memory; without memory it only measures.
class Carver {
 public:
  explicit Carver(std::byte* base = nullptr) : base_(base) {}
  // [rows, cols] without gaps.
  [[nodiscard]] tensor::MatrixView matrix(int64_t rows, int64_t cols, tensor::DType dtype);
  [[nodiscard]] int64_t bytes() const { return used_; }
  [[nodiscard]] bool measures() const { return base_ == nullptr; }

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

}  // namespace phalanx::layers
