#pragma once

// Random matrices and their owners, for the tests of this room.

#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "phalanx/ops/ops.h"

namespace phalanx::ops {

class Matrix {
 public:
  Matrix(DType dtype, int64_t rows, int64_t cols, int64_t stride = 0)
      : view_{nullptr, dtype, rows, cols, stride == 0 ? cols : stride},
        bytes_(static_cast<size_t>(rows * view_.stride) * tensor::dtype_bytes(dtype)) {
    view_.data = bytes_.data();
  }
  Matrix(Matrix&&) = default;
  Matrix& operator=(Matrix&&) = default;
  Matrix(const Matrix& other) : view_(other.view_), bytes_(other.bytes_) {
    view_.data = bytes_.data();
  }
  [[nodiscard]] const MatrixView& view() const { return view_; }
  [[nodiscard]] float get(int64_t r, int64_t c) const {
    const int64_t i = r * view_.stride + c;
    switch (view_.dtype) {
      case DType::kBF16: return tensor::bf16_to_f32(static_cast<uint16_t*>(view_.data)[i]);
      case DType::kF16: return tensor::f16_to_f32(static_cast<uint16_t*>(view_.data)[i]);
      default: return static_cast<float*>(view_.data)[i];
    }
  }
  void set(int64_t r, int64_t c, float v) {
    const int64_t i = r * view_.stride + c;
    switch (view_.dtype) {
      case DType::kBF16: static_cast<uint16_t*>(view_.data)[i] = tensor::f32_to_bf16(v); break;
      case DType::kF16: static_cast<uint16_t*>(view_.data)[i] = tensor::f32_to_f16(v); break;
      default: static_cast<float*>(view_.data)[i] = v;
    }
  }
  // Bits of one row (without the gap up to the stride).
  [[nodiscard]] std::vector<std::byte> row_bits(int64_t r) const {
    const auto size = tensor::dtype_bytes(view_.dtype);
    const std::byte* p = bytes_.data() + static_cast<size_t>(r * view_.stride) * size;
    return {p, p + static_cast<size_t>(view_.cols) * size};
  }
  [[nodiscard]] const std::vector<std::byte>& bits() const { return bytes_; }

 private:
  MatrixView view_;
  std::vector<std::byte> bytes_;
};

inline Matrix random_matrix(DType dtype, int64_t rows, int64_t cols, uint32_t seed,
                            float scale = 1.0f, int64_t stride = 0) {
  Matrix m(dtype, rows, cols, stride);
  std::mt19937 random(seed);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c)
      m.set(r, c, scale * (static_cast<float>(random() % 4001) / 2000.0f - 1.0f));
  return m;
}

// 64-byte aligned bytes.
class Aligned {
 public:
  explicit Aligned(int64_t bytes)
      : bytes_(static_cast<std::byte*>(
            std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)))) {
    std::memset(bytes_.get(), 0xff, static_cast<size_t>(bytes));
  }
  [[nodiscard]] std::byte* data() const { return bytes_.get(); }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> bytes_;
};

// A pool of `threads` and a context on it.
struct Runner {
  Runner(Isa isa, int threads)
      : pool({.threads = threads, .spin_us = 5}),
        ctx({.isa = isa,
             .max_tokens = 600,
             .max_k = 2048,
             .max_rows = 4096,
             .max_heads = 32,
             .max_head_dim = 128,
             .max_context = 4096},
            pool) {}
  ThreadPool pool;
  Context ctx;
};

}  // namespace phalanx::ops
