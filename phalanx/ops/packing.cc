#include "phalanx/ops/packing.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "phalanx/base/check.h"
#include "phalanx/ops/cpu/transpose.h"
#include "phalanx/ops/ops.h"

namespace phalanx::ops {
namespace {

constexpr int64_t kRows = tensor::kPanelRows;

void check_weight(const MatrixView& source, std::byte* packed) {
  PHALANX_CHECK(source.dtype == DType::kBF16 || source.dtype == DType::kF16 ||
                source.dtype == DType::kF32);
  PHALANX_CHECK(reinterpret_cast<uintptr_t>(packed) % 64 == 0);
}

// Rows [row, row + count) of source, count <= 16, into one panel from column k_begin on; missing rows
// become zeros.
template <typename T, bool kPairs>
void pack_panel(const MatrixView& source, int64_t row, int64_t count, int64_t k_begin, T* panel) {
  const int64_t k_padded = source.cols + source.cols % 2;
  if (count < kRows || source.cols != k_padded)
    std::fill(panel + k_begin * kRows, panel + k_padded * kRows, T{0});
  // Blocks of k keep both the 16 source lines and the panel's lines in cache.
  constexpr int64_t kBlock = 64;
  for (int64_t k0 = k_begin; k0 < source.cols; k0 += kBlock) {
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

// 8 words of each of 8 rows, `stride` words apart, to out[word][16 words].
[[gnu::target("avx2")]] void transpose(const uint32_t* in, int64_t stride, uint32_t* out) {
  __m256i rows[8];
  for (int i = 0; i < 8; ++i)
    rows[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i * stride));
  cpu::transpose8(rows);
  for (int i = 0; i < 8; ++i)
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + i * kRows), rows[i]);
}

// As pack_panel for 16 whole rows, up to the column it returns: words (one f32, or two neighbours of
// 16 bits) are transposed in registers and written past the caches, since nobody reads them soon.
// halves: the two 16-bit parts of a word belong to lines of their own (f16).
[[gnu::target("avx2")]] int64_t pack_words(const MatrixView& source, int64_t row, bool halves,
                                           std::byte* panel) {
  constexpr int64_t kWords = 8;
  const int64_t words = source.cols * static_cast<int64_t>(dtype_bytes(source.dtype)) / 4;
  const int64_t stride = source.stride * static_cast<int64_t>(dtype_bytes(source.dtype)) / 4;
  const auto* in = static_cast<const uint32_t*>(source.rows_of(row, kRows).data);
  const int64_t whole = words / kWords * kWords;
  alignas(64) uint32_t lines[kWords * kRows];
  auto* out = reinterpret_cast<__m256i*>(panel);
  for (int64_t w = 0; w < whole; w += kWords) {
    transpose(in + w, stride, lines);
    transpose(in + w + 8 * stride, stride, lines + 8);
    const auto* from = reinterpret_cast<const __m256i*>(lines);
    for (int64_t i = 0; i < kWords; ++i, out += 2, from += 2) {
      __m256i first = _mm256_load_si256(from);
      __m256i second = _mm256_load_si256(from + 1);
      if (halves) {
        const __m256i low = _mm256_set1_epi32(0xffff);
        const __m256i even = _mm256_packus_epi32(_mm256_and_si256(first, low),
                                                 _mm256_and_si256(second, low));
        const __m256i odd = _mm256_packus_epi32(_mm256_srli_epi32(first, 16),
                                                _mm256_srli_epi32(second, 16));
        first = _mm256_permute4x64_epi64(even, 0xD8);
        second = _mm256_permute4x64_epi64(odd, 0xD8);
      }
      _mm256_stream_si256(out, first);
      _mm256_stream_si256(out + 1, second);
    }
  }
  _mm_sfence();
  return whole * 4 / static_cast<int64_t>(dtype_bytes(source.dtype));
}

// Every row begins at a whole word, and the machine can.
bool can_pack_words(const MatrixView& source, int64_t count) {
  const auto bytes = static_cast<int64_t>(dtype_bytes(source.dtype));
  return count == kRows && source.stride * bytes % 4 == 0 &&
         reinterpret_cast<uintptr_t>(source.data) % 4 == 0 && __builtin_cpu_supports("avx2");
}

void pack_into(const MatrixView& source, int64_t row, int64_t count, std::byte* panel) {
  int64_t k = 0;
  if (can_pack_words(source, count)) k = pack_words(source, row, source.dtype == DType::kF16, panel);
  switch (source.dtype) {
    case DType::kBF16:
      return pack_panel<uint16_t, true>(source, row, count, k, reinterpret_cast<uint16_t*>(panel));
    case DType::kF16:
      return pack_panel<uint16_t, false>(source, row, count, k, reinterpret_cast<uint16_t*>(panel));
    default:
      return pack_panel<uint32_t, false>(source, row, count, k, reinterpret_cast<uint32_t*>(panel));
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
