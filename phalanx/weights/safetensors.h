#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/tensor/dtype.h"

namespace phalanx::weights {

// One tensor of a checkpoint: where its bytes lie. Row-major, little-endian, without gaps.
struct TensorEntry {
  std::string name;
  tensor::DType dtype = tensor::DType::kF32;
  std::vector<int64_t> shape;
  int64_t offset = 0;  // of its first byte in the file
  int64_t bytes = 0;
  int file = 0;  // index into Checkpoint's files; 0 from read_safetensors_header

  // Bytes of one index of the first dimension; a scalar has one row.
  [[nodiscard]] int64_t rows() const { return shape.empty() ? 1 : shape[0]; }
  [[nodiscard]] int64_t row_bytes() const { return rows() == 0 ? 0 : bytes / rows(); }
};

// "[310, 72]"
[[nodiscard]] std::string shape_text(const std::vector<int64_t>& shape);

// Reads and verifies the header of the safetensors file open as `fd`: 8 bytes little-endian length,
// JSON, then the data, which must be covered exactly and without overlap (format:
// https://github.com/huggingface/safetensors#format). What is wrong is added to `problems`, each
// naming `path` and the tensor; the result is only of use if nothing was added.
[[nodiscard]] std::vector<TensorEntry> read_safetensors_header(int fd, const std::string& path,
                                                               Problems& problems);

}  // namespace phalanx::weights
