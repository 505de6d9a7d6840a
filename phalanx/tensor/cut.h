#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace phalanx::tensor {

// Half-open range of rows, heads, panels...
struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  [[nodiscard]] int64_t size() const { return end - begin; }
  [[nodiscard]] bool contains(int64_t i) const { return i >= begin && i < end; }
  friend bool operator==(const Range&, const Range&) = default;
};

// Output rows per panel: the unit in which linear layers are cut and packed.
inline constexpr int64_t kPanelRows = 16;

// Cuts `total` things into one contiguous range per rank, in rank order, in units of `unit`
// (the last unit may be short), proportionally to `weights` (largest remainder; equal remainders go
// to lower ranks, or to higher ones if `remainder_to_high` is set). A range may be empty.
// weights: one per rank, all > 0.
[[nodiscard]] std::vector<Range> cut(int64_t total, int64_t unit, std::span<const double> weights,
                                     bool remainder_to_high = false);

// KV heads a rank must store for its query heads: all that the range touches.
// group = query heads per KV head.
[[nodiscard]] Range kv_heads_of(Range query_heads, int64_t group);

}  // namespace phalanx::tensor
