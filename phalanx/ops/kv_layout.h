#pragma once

// Where an element of the KV cache lies within a block of one head (block_size * head_dim
// elements):
//   in panels  K [offset / 16][i / 2][16][2], V [offset / 2][i][2] (f32: K [offset / 16][i][16],
//              V [offset][i]): what the products of attention stream through. Used when block_size
//              and head_dim are multiples of 16.
//   in rows    K and V [offset][i]: other shapes.
// Rows that are keys and values at once lie as keys.
// A block is whole in itself: blocks may be copied and moved as bytes.

#include <cstdint>

#include "phalanx/ops/ops.h"

namespace phalanx::ops {

// Positions of a unit of K or V: a panel of keys, and the values of the same positions.
inline constexpr int64_t kKvUnit = 16;

[[nodiscard]] constexpr bool kv_in_panels(int64_t block_size, int64_t head_dim) {
  return block_size % kKvUnit == 0 && head_dim % 16 == 0;
}
[[nodiscard]] inline bool kv_in_panels(const KvLayer& kv) {
  return kv_in_panels(kv.block_size, kv.head_dim);
}

// First element of a block's head.
[[nodiscard]] inline int64_t kv_head_index(const KvLayer& kv, int64_t block, int64_t kv_head) {
  return (block * kv.kv_heads + kv_head) * kv.block_size * kv.head_dim;
}

// Element (offset, i) of keys laid out in panels.
[[nodiscard]] constexpr int64_t key_panel_index(int64_t offset, int64_t i, int64_t head_dim,
                                                bool f32) {
  const int64_t panel = offset / kKvUnit * kKvUnit * head_dim;
  if (f32) return panel + i * kKvUnit + offset % kKvUnit;
  return panel + (i / 2 * kKvUnit + offset % kKvUnit) * 2 + i % 2;
}
// Element (offset, i) of values laid out in panels.
[[nodiscard]] constexpr int64_t value_panel_index(int64_t offset, int64_t i, int64_t head_dim,
                                                  bool f32) {
  if (f32) return offset * head_dim + i;
  return (offset / 2 * head_dim + i) * 2 + offset % 2;
}

[[nodiscard]] inline int64_t kv_key_index(const KvLayer& kv, int64_t block, int64_t kv_head,
                                          int64_t offset, int64_t i) {
  return kv_head_index(kv, block, kv_head) +
         (kv_in_panels(kv) ? key_panel_index(offset, i, kv.head_dim, kv.dtype == DType::kF32)
                           : offset * kv.head_dim + i);
}
[[nodiscard]] inline int64_t kv_value_index(const KvLayer& kv, int64_t block, int64_t kv_head,
                                            int64_t offset, int64_t i) {
  if (kv.shared()) return kv_key_index(kv, block, kv_head, offset, i);
  return kv_head_index(kv, block, kv_head) +
         (kv_in_panels(kv) ? value_panel_index(offset, i, kv.head_dim, kv.dtype == DType::kF32)
                           : offset * kv.head_dim + i);
}
// Of k_row_scale and v_row_scale.
[[nodiscard]] inline int64_t kv_scale_index(const KvLayer& kv, int64_t block, int64_t kv_head,
                                            int64_t offset) {
  return (block * kv.kv_heads + kv_head) * kv.block_size + offset;
}

}  // namespace phalanx::ops
