#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace phalanx::comm {

// Bytes lent by a caller: `rows` runs of `row_bytes`, `stride` bytes apart. A column block of a
// matrix, or with rows == 1 a plain buffer.
struct Region {
  std::byte* data = nullptr;
  int64_t rows = 0;
  int64_t row_bytes = 0;
  int64_t stride = 0;

  [[nodiscard]] int64_t bytes() const { return rows * row_bytes; }

  static Region plain(std::byte* data, int64_t bytes) { return {data, 1, bytes, bytes}; }
  // A column block; one run where the block is the whole width.
  static Region columns(std::byte* data, int64_t rows, int64_t row_bytes, int64_t stride) {
    if (row_bytes == stride) return plain(data, rows * row_bytes);
    return {data, rows, row_bytes, stride};
  }
};

[[nodiscard]] inline int64_t total_bytes(std::span<const Region> regions) {
  int64_t sum = 0;
  for (const Region& region : regions) sum += region.bytes();
  return sum;
}

// Walks the bytes of several regions, one after the other, as one stream. The regions must outlive
// the cursor.
class RegionCursor {
 public:
  RegionCursor() = default;
  explicit RegionCursor(std::span<const Region> regions)
      : regions_(regions), left_(total_bytes(regions)) {
    skip_empty();
  }

  [[nodiscard]] int64_t left() const { return left_; }

  // Moves past `count` <= left() bytes.
  void advance(int64_t count) {
    left_ -= count;
    while (count > 0) {
      const Region& region = regions_[index_];
      const int64_t step = std::min(count, region.row_bytes - offset_);
      count -= step;
      offset_ += step;
      if (offset_ == region.row_bytes) {
        offset_ = 0;
        const int64_t whole = std::min(count / region.row_bytes, region.rows - row_ - 1);
        row_ += 1 + whole;
        count -= whole * region.row_bytes;
        if (row_ == region.rows) {
          row_ = 0;
          ++index_;
          skip_empty();
        }
      }
    }
  }

  // The next bytes as up to `capacity` runs, without moving. Returns how many were filled.
  [[nodiscard]] int peek(iovec* runs, int capacity) const {
    RegionCursor at = *this;
    int count = 0;
    while (count < capacity && at.left_ > 0) {
      const std::span<std::byte> run = at.next(at.left_);
      runs[count++] = {run.data(), run.size()};
    }
    return count;
  }

  // Copies the next `count` <= left() bytes to `target` and moves past them.
  void copy_to(std::byte* target, int64_t count) {
    while (count > 0) {
      const std::span<std::byte> run = next(count);
      std::memcpy(target, run.data(), run.size());
      target += run.size();
      count -= static_cast<int64_t>(run.size());
    }
  }

  // Fills the next `count` <= left() bytes from `source` and moves past them.
  void copy_from(const std::byte* source, int64_t count) {
    while (count > 0) {
      const std::span<std::byte> run = next(count);
      std::memcpy(run.data(), source, run.size());
      source += run.size();
      count -= static_cast<int64_t>(run.size());
    }
  }

 private:
  // The next run of at most `limit` > 0 bytes; moves past it.
  std::span<std::byte> next(int64_t limit) {
    const Region& region = regions_[index_];
    const int64_t count = std::min(limit, region.row_bytes - offset_);
    std::byte* run = region.data + row_ * region.stride + offset_;
    offset_ += count;
    left_ -= count;
    if (offset_ == region.row_bytes) {
      offset_ = 0;
      if (++row_ == region.rows) {
        row_ = 0;
        ++index_;
        skip_empty();
      }
    }
    return {run, static_cast<size_t>(count)};
  }

  void skip_empty() {
    while (index_ < regions_.size() && regions_[index_].bytes() == 0) ++index_;
  }

  std::span<const Region> regions_;
  size_t index_ = 0;
  int64_t row_ = 0;
  int64_t offset_ = 0;
  int64_t left_ = 0;
};

}  // namespace phalanx::comm
