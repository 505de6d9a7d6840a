#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "phalanx/base/check.h"
#include "phalanx/tensor/dtype.h"

namespace phalanx::tensor {

// A matrix somebody else owns: `rows` rows of `cols` elements, `stride` elements apart
// (stride >= cols). Looking only; a stored view must be outlived by its owner.
struct MatrixView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;

  template <typename T>
  [[nodiscard]] T* row(int64_t r) const {
    return static_cast<T*>(data) + r * stride;
  }
  // Columns [begin, begin + count) of the same rows.
  [[nodiscard]] MatrixView columns(int64_t begin, int64_t count) const {
    PHALANX_CHECK(begin >= 0 && count >= 0 && begin + count <= cols);
    return {static_cast<std::byte*>(data) + begin * static_cast<int64_t>(dtype_bytes(dtype)), dtype,
            rows, count, stride};
  }
  [[nodiscard]] MatrixView rows_of(int64_t begin, int64_t count) const {
    PHALANX_CHECK(begin >= 0 && count >= 0 && begin + count <= rows);
    return {static_cast<std::byte*>(data) +
                begin * stride * static_cast<int64_t>(dtype_bytes(dtype)),
            dtype, count, cols, stride};
  }
};

}  // namespace phalanx::tensor
