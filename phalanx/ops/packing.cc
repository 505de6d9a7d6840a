#include "phalanx/ops/packing.h"

#include <algorithm>
#include <cstring>

#include "phalanx/base/check.h"
#include "phalanx/ops/ops.h"

namespace phalanx::ops {
namespace {

constexpr int64_t kRows = tensor::kPanelRows;

void check_weight(const MatrixView& source, std::byte* packed) {
  PHALANX_CHECK(source.dtype == DType::kBF16 || source.dtype == DType::kF16 ||
                source.dtype == DType::kF32);
  PHALANX_CHECK(reinterpret_cast<uintptr_t>(packed) % 64 == 0);
}

// Rows [row, row + count) of source, count <= 16, into one panel; missing rows become zeros.
template <typename T, bool kPairs>
void pack_panel(const MatrixView& source, int64_t row, int64_t count, T* panel) {
  const int64_t k_padded = source.cols + source.cols % 2;
  if (count < kRows || source.cols != k_padded)
    std::memset(panel, 0, static_cast<size_t>(kRows * k_padded) * sizeof(T));
  // Blocks of k keep both the 16 source lines and the panel's lines in cache.
  constexpr int64_t kBlock = 64;
  for (int64_t k0 = 0; k0 < source.cols; k0 += kBlock) {
    const int64_t k1 = std::min(k0 + kBlock, source.cols);
    for (int64_t r = 0; r < count; ++r) {
      const T* in = source.row<const T>(row + r);
      for (int64_t k = k0; k < k1; ++k) {
        const int64_t at = kPairs ? (k / 2 * kRows + r) * 2 + k % 2 : k * kRows + r;
        panel[at] = in[k];
      }
    }
  }
}

void pack_into(const MatrixView& source, int64_t row, int64_t count, std::byte* panel) {
  switch (source.dtype) {
    case DType::kBF16:
      return pack_panel<uint16_t, true>(source, row, count, reinterpret_cast<uint16_t*>(panel));
    case DType::kF16:
      return pack_panel<uint16_t, false>(source, row, count, reinterpret_cast<uint16_t*>(panel));
    default:
      return pack_panel<uint32_t, false>(source, row, count, reinterpret_cast<uint32_t*>(panel));
  }
}

// Panel p of the destination is panel p * step + offset.
void pack(const MatrixView& source, int64_t row_begin, int64_t rows, int64_t step, int64_t offset,
          std::byte* packed) {
  check_weight(source, packed);
  PHALANX_CHECK(row_begin % kRows == 0 && row_begin + source.rows <= rows);
  PHALANX_CHECK(source.rows % kRows == 0 || row_begin + source.rows == rows);
  const int64_t bytes = panel_bytes(source.cols, source.dtype);
  for (int64_t row = 0; row < source.rows; row += kRows) {
    const int64_t panel = (row_begin + row) / kRows * step + offset;
    pack_into(source, row, std::min(kRows, source.rows - row), packed + panel * bytes);
  }
}

}  // namespace

int64_t packed_bytes(int64_t rows, int64_t k, DType dtype, Isa) {
  return panels_of(rows) * panel_bytes(k, dtype);
}

void pack_rows(const MatrixView& source, int64_t row_begin, int64_t rows, std::byte* packed, Isa) {
  pack(source, row_begin, rows, 1, 0, packed);
}

int64_t packed_gated_bytes(int64_t rows, int64_t k, DType dtype, Isa isa) {
  return 2 * packed_bytes(rows, k, dtype, isa);
}

void pack_gated_rows(const MatrixView& source, int64_t row_begin, int64_t rows, int which,
                     std::byte* packed, Isa) {
  PHALANX_CHECK(which == 0 || which == 1);
  pack(source, row_begin, rows, 2, which, packed);
}

void unpack_row(const PackedLinear& w, int64_t row, void* out) {
  PHALANX_CHECK(row >= 0 && row < w.rows);
  const std::byte* panel = w.data + row / kRows * panel_bytes(w.k, w.dtype);
  const int64_t r = row % kRows;
  if (w.dtype == DType::kF32) {
    for (int64_t k = 0; k < w.k; ++k)
      static_cast<uint32_t*>(out)[k] =
          reinterpret_cast<const uint32_t*>(panel)[panel_index(r, k, w.dtype)];
  } else {
    for (int64_t k = 0; k < w.k; ++k)
      static_cast<uint16_t*>(out)[k] =
          reinterpret_cast<const uint16_t*>(panel)[panel_index(r, k, w.dtype)];
  }
}

}  // namespace phalanx::ops
