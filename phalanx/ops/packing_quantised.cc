#include <cstring>

#include "phalanx/base/check.h"
#include "phalanx/ops/packing.h"
#include "phalanx/ops/quantised.h"

namespace phalanx::ops {
namespace {

using quant::Storage;
constexpr int64_t kRows = tensor::kPanelRows;
constexpr int64_t kParameterBytes = kRows * 4;

int64_t parameter_bytes(Storage storage, bool zeros) {
  return storage == Storage::kInt8 ? 3 * kParameterBytes : (zeros ? 2 : 1) * kParameterBytes;
}

// Byte of a code within its group; for kCodes4 also which half of it.
int64_t code_place(Storage storage, int64_t row, int64_t k) {
  switch (storage) {
    case Storage::kInt8: return k / 4 * 64 + row * 4 + k % 4;
    case Storage::kCodes4: return k / 8 * 64 + row * 4 + k % 2 * 2 + k % 8 / 4;
    default: return k / 4 * 64 + row / 4 * 16 + k % 4 / 2 * 8 + row % 4 * 2 + k % 2;
  }
}

}  // namespace

int64_t quantised_panel_bytes(Storage storage, int64_t k, int64_t group, bool zeros) {
  PHALANX_CHECK(storage != Storage::kFloat && group > 0);
  int64_t bytes = 0;
  for (int64_t begin = 0; begin < k; begin += group)
    bytes += code_bytes(storage, std::min(group, k - begin)) + parameter_bytes(storage, zeros);
  return bytes;
}

int64_t packed_bytes(const PackedLinear& w) {
  if (w.storage == Storage::kFloat) return packed_bytes(w.rows, w.k, w.dtype, w.isa);
  return panels_of(w.rows) * quantised_panel_bytes(w.storage, w.k, w.group, w.zeros);
}

PackedGroup packed_group(const PackedLinear& w, int64_t panel, int64_t group) {
  const int64_t whole = code_bytes(w.storage, w.group) + parameter_bytes(w.storage, w.zeros);
  PackedGroup g{.k_begin = group * w.group, .k_end = std::min((group + 1) * w.group, w.k)};
  g.codes = w.data + panel * quantised_panel_bytes(w.storage, w.k, w.group, w.zeros) + group * whole;
  const std::byte* parameters = g.codes + code_bytes(w.storage, g.k_end - g.k_begin);
  g.scale = reinterpret_cast<const float*>(parameters);
  if (w.zeros || w.storage == Storage::kInt8)
    g.zero = reinterpret_cast<const float*>(parameters + kParameterBytes);
  if (w.storage == Storage::kInt8)
    g.add = reinterpret_cast<const int32_t*>(parameters + 2 * kParameterBytes);
  return g;
}

uint8_t packed_code(Storage storage, const std::byte* codes, int64_t row, int64_t k) {
  const auto byte = static_cast<uint8_t>(codes[code_place(storage, row, k)]);
  if (storage == Storage::kInt8) return byte ^ 0x80U;
  if (storage != Storage::kCodes4) return byte;
  return k % 4 / 2 == 0 ? byte & 15U : byte >> 4;
}

void pack_quantised(const quant::Rows& source, int64_t row_begin, int64_t rows,
                    const PackedLinear& w, int64_t step, int64_t offset, std::byte* packed) {
  PHALANX_CHECK(source.storage == w.storage && source.k == w.k && source.group == w.group);
  PHALANX_CHECK(row_begin % kRows == 0 && row_begin + source.rows <= rows);
  PHALANX_CHECK(source.rows % kRows == 0 || row_begin + source.rows == rows);
  PHALANX_CHECK(w.zeros || w.storage == Storage::kInt8 || source.zero.empty());
  PackedLinear to = w;
  to.data = packed;
  const int64_t groups = w.k == 0 ? 0 : (w.k + w.group - 1) / w.group;
  // A code of value zero where there is one; scales of rows that do not exist are zero anyway.
  const std::byte empty{w.storage == Storage::kCodes4 ? uint8_t{0x88}
                        : w.storage == Storage::kInt8 ? uint8_t{0x80}
                                                      : uint8_t{0}};
  for (int64_t row = 0; row < source.rows; row += kRows) {
    const int64_t count = std::min(kRows, source.rows - row);
    const int64_t panel = (row_begin + row) / kRows * step + offset;
    for (int64_t g = 0; g < groups; ++g) {
      const PackedGroup at = packed_group(to, panel, g);
      auto* codes = const_cast<std::byte*>(at.codes);
      const int64_t bytes = code_bytes(w.storage, at.k_end - at.k_begin);
      std::memset(codes, static_cast<int>(empty), static_cast<size_t>(bytes));
      std::memset(codes + bytes, 0, static_cast<size_t>(parameter_bytes(w.storage, w.zeros)));
      auto* scale = const_cast<float*>(at.scale);
      auto* zero = const_cast<float*>(at.zero);
      auto* add = const_cast<int32_t*>(at.add);
      for (int64_t r = 0; r < count; ++r) {
        const uint8_t* in = source.codes.data() + (row + r) * w.k;
        const auto parameter = static_cast<size_t>((row + r) * groups + g);
        scale[r] = source.scale[parameter];
        if (zero != nullptr && !source.zero.empty()) zero[r] = source.zero[parameter];
        if (add != nullptr && !source.add.empty()) add[r] = source.add[static_cast<size_t>(row + r)];
        for (int64_t k = at.k_begin; k < at.k_end; ++k) {
          std::byte& byte = codes[code_place(w.storage, r, k - at.k_begin)];
          if (w.storage == Storage::kInt8)
            byte = std::byte(in[k] ^ 0x80U);
          else if (w.storage != Storage::kCodes4)
            byte = std::byte(in[k]);
          else if ((k - at.k_begin) % 4 / 2 == 0)
            byte = (byte & std::byte{0xf0}) | std::byte(in[k]);
          else
            byte = (byte & std::byte{0x0f}) | std::byte(in[k] << 4);
        }
      }
    }
  }
}

}  // namespace phalanx::ops
