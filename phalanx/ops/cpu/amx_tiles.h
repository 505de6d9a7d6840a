#pragma once

// Products by tiles, 16 rows of 64 bytes as AMX has them, over a policy Tiles: the machine's
// registers (amx.cc), or memory with the arithmetic of the manual (the tests).
//   configure(first, second)  tiles 0 and 1, or 0 to 3 if second is 0, and 4 get `first` rows, 2, 3
//                             and 5 `second` rows, 6 and 7 16 rows; all tiles become zeros
//   release()
//   zero<t>(), load<t>(from, stride), store<t>(to, stride)   stride in bytes
//   bf16<c, a, b>()           c += a * b by TDPBF16PS
//   signed_unsigned<c, a, b>()  by TDPBSUD
// Panels of bf16 pairs and of int8 lie in memory as the tiles want them: 16 lines of 64 bytes.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "phalanx/ops/cpu/integer_kernels.h"
#include "phalanx/ops/cpu/kernels.h"

namespace phalanx::ops::cpu {

inline constexpr int64_t kTileLines = 16;
inline constexpr int64_t kTileLine = 64;  // bytes
inline constexpr int64_t kTileBytes = kTileLines * kTileLine;

// As Product and Int8Product, in bytes. A row of x has k_bytes; a panel 64 bytes for each 4 of them
// (a part of 4 counts whole). Beyond them the tiles have zeros.
struct TileProduct {
  const std::byte* x = nullptr;
  int64_t x_stride = 0;
  int64_t rows = 0;
  const std::byte* w = nullptr;
  int64_t panel_stride = 0;
  int64_t panels = 0;
  int64_t k_bytes = 0;
  std::byte* c = nullptr;
  int64_t c_stride = 0;
  bool accumulate = false;
  const std::byte* next = nullptr;

  [[nodiscard]] int64_t whole() const { return k_bytes / kTileLine; }
  [[nodiscard]] int64_t tail() const { return k_bytes % kTileLine; }
  [[nodiscard]] int64_t panel_bytes() const { return (k_bytes + 3) / 4 * kTileLine; }
};

// use<0>(), use<1>(), ...
template <int kCount, typename Use>
inline __attribute__((always_inline)) void for_constants(Use use) {
  [&]<int... kI>(std::integer_sequence<int, kI...>) {
    (use.template operator()<kI>(), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// Up to 32 rows of x from `row` on by some panels. x_tail: their bytes beyond the whole tiles,
// [rows][64]. ahead: asks for memory 4 KiB before its use, at a panel's end for that of `next`.
template <bool kBf16, int kRowTiles, int kPanels, typename Tiles>
void run_tiles(Tiles& tiles, const TileProduct& a, int64_t row, int64_t panel,
               const std::byte* x_tail, bool ahead) {
  constexpr int64_t kAheadBytes = 4096;
  constexpr int kRowStep = 4 / kRowTiles;  // between the tiles of c below each other
  const std::byte* w = a.w + panel * a.panel_stride;
  std::byte* c = a.c + row * a.c_stride + panel * kTileLine;
  for_constants<kRowTiles>([&]<int kR>() {
    for_constants<kPanels>([&]<int kP>() {
      constexpr int kC = kR * kRowStep + kP;
      if (a.accumulate)
        tiles.template load<kC>(c + kR * kTileLines * a.c_stride + kP * kTileLine, a.c_stride);
      else
        tiles.template zero<kC>();
    });
  });
  const auto block = [&](const std::byte* x, int64_t x_stride, const std::byte* weights,
                         int64_t stride) __attribute__((always_inline)) {
    for_constants<kRowTiles>([&]<int kR>() {
      tiles.template load<4 + kR>(x + kR * kTileLines * x_stride, x_stride);
    });
    for_constants<kPanels>([&]<int kP>() {
      constexpr int kB = 6 + kP % 2;
      tiles.template load<kB>(weights + kP * stride, kTileLine);
      for_constants<kRowTiles>([&]<int kR>() {
        if constexpr (kBf16)
          tiles.template bf16<kR * kRowStep + kP, 4 + kR, kB>();
        else
          tiles.template signed_unsigned<kR * kRowStep + kP, 4 + kR, kB>();
      });
    });
  };
  const std::byte* x = a.x + row * a.x_stride;
  for (int64_t i = 0; i < a.whole(); ++i) {
    if (ahead) {
      const int64_t at = i * kTileBytes + kAheadBytes;
      for (int64_t p = 0; p < kPanels; ++p) {
        const bool own = at < a.panel_bytes();
        if (!own && a.next == nullptr) continue;
        const std::byte* from = own ? w + p * a.panel_stride + at
                                    : a.next + (panel + p) * a.panel_stride + at - a.panel_bytes();
        for (int64_t line = 0; line < kTileLines; ++line)
          __builtin_prefetch(from + line * kTileLine, 0, 2);
      }
    }
    block(x + i * kTileLine, a.x_stride, w + i * kTileBytes, a.panel_stride);
  }
  if (a.tail() > 0) {
    alignas(64) std::byte w_tail[kPanels * kTileBytes] = {};
    for (int64_t p = 0; p < kPanels; ++p)
      std::memcpy(w_tail + p * kTileBytes, w + p * a.panel_stride + a.whole() * kTileBytes,
                  static_cast<size_t>(a.panel_bytes() - a.whole() * kTileBytes));
    block(x_tail, kTileLine, w_tail, kTileBytes);
  }
  for_constants<kRowTiles>([&]<int kR>() {
    for_constants<kPanels>([&]<int kP>() {
      tiles.template store<kR * kRowStep + kP>(
          c + kR * kTileLines * a.c_stride + kP * kTileLine, a.c_stride);
    });
  });
}

template <bool kBf16, typename Tiles>
void multiply_tiles(const TileProduct& a) {
  Tiles tiles;
  alignas(64) std::byte x_tail[2 * kTileBytes] = {};
  int64_t configured = 0;
  for (int64_t row = 0; row < a.rows; row += 2 * kTileLines) {
    const int64_t rows = std::min(2 * kTileLines, a.rows - row);
    const int64_t first = std::min(kTileLines, rows);
    if (rows != configured) tiles.configure(first, rows - first);
    configured = rows;
    if (a.tail() > 0)
      for (int64_t m = 0; m < rows; ++m)
        std::memcpy(x_tail + m * kTileLine,
                    a.x + (row + m) * a.x_stride + a.whole() * kTileLine,
                    static_cast<size_t>(a.tail()));
    const bool ahead = row == 0;
    int64_t p = 0;
    if (rows > kTileLines) {
      for (; p + 2 <= a.panels; p += 2) run_tiles<kBf16, 2, 2>(tiles, a, row, p, x_tail, ahead);
      for (; p < a.panels; ++p) run_tiles<kBf16, 2, 1>(tiles, a, row, p, x_tail, ahead);
    } else {
      for (; p + 4 <= a.panels; p += 4) run_tiles<kBf16, 1, 4>(tiles, a, row, p, x_tail, ahead);
      for (; p + 2 <= a.panels; p += 2) run_tiles<kBf16, 1, 2>(tiles, a, row, p, x_tail, ahead);
      for (; p < a.panels; ++p) run_tiles<kBf16, 1, 1>(tiles, a, row, p, x_tail, ahead);
    }
  }
  tiles.release();
}

// Kernels::multiply_bf16 of the class amx.
template <typename Tiles>
void multiply_bf16_tiles(const Product& a) {
  multiply_tiles<true, Tiles>({.x = static_cast<const std::byte*>(a.x),
                               .x_stride = a.x_stride * 2,
                               .rows = a.rows,
                               .w = a.w,
                               .panel_stride = a.panel_stride,
                               .panels = a.panels,
                               .k_bytes = a.k * 2,
                               .c = reinterpret_cast<std::byte*>(a.c),
                               .c_stride = a.c_stride * 4,
                               .accumulate = a.accumulate,
                               .next = a.next});
}

// IntegerKernels::multiply_int8.
template <typename Tiles>
void multiply_int8_tiles(const Int8Product& a) {
  if (!a.accumulate)  // takes back the turned sign bits
    for (int64_t m = 0; m < a.rows; ++m)
      std::fill_n(a.c + m * a.c_stride, 16 * a.panels, -128 * a.x_sum[m]);
  multiply_tiles<false, Tiles>({.x = reinterpret_cast<const std::byte*>(a.x),
                                .x_stride = a.x_stride,
                                .rows = a.rows,
                                .w = a.w,
                                .panel_stride = a.panel_stride,
                                .panels = a.panels,
                                .k_bytes = a.k,
                                .c = reinterpret_cast<std::byte*>(a.c),
                                .c_stride = a.c_stride * 4,
                                .accumulate = true,
                                .next = a.next});
}

}  // namespace phalanx::ops::cpu
