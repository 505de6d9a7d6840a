#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/weights/checkpoint.h"

namespace phalanx::weights {

// Reads one rank's rows of a checkpoint, and knows what was never asked for. All methods are
// thread-safe; reads block on the disk.
class WeightSource {
 public:
  explicit WeightSource(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {}  // lent

  // Marks the tensor as asked for. Throws Error(kNotFound) when it is absent.
  const TensorEntry& ask(std::string_view name);
  // Rows [row_begin, row_begin + rows) of the first dimension, as stored, into `out`
  // (rows * entry.row_bytes() bytes). Throws Error(kDataLoss) when the file has shrunk,
  // kUnavailable on a read error.
  void read_rows(const TensorEntry& entry, int64_t row_begin, int64_t rows, std::byte* out);
  // Of every index of the first dimension, bytes [begin, begin + bytes), one after the other.
  void read_columns(const TensorEntry& entry, int64_t begin, int64_t bytes, std::byte* out);

  // Those rows will be read soon: lets the disk begin, where the system does not hold them in its
  // cache.
  void will_read_rows(const TensorEntry& entry, int64_t row_begin, int64_t rows);

  [[nodiscard]] const Checkpoint& checkpoint() const { return checkpoint_; }
  [[nodiscard]] int64_t bytes_read() const { return bytes_read_.load(std::memory_order_relaxed); }
  [[nodiscard]] int64_t tensors_asked() const;

  // Names of tensors never asked for, in one warning in the log, but those that are known to be left
  // over.
  std::vector<std::string> finish(const std::function<bool(std::string_view)>& known);

 private:
  // Whether the system has the byte at `offset` in its cache, as far as it tells.
  [[nodiscard]] bool cached(const TensorEntry& entry, int64_t offset) const;
  void read(const TensorEntry& entry, int64_t offset, int64_t bytes, std::byte* out);

  const Checkpoint& checkpoint_;
  std::atomic<int64_t> bytes_read_{0};
  std::atomic<bool> from_disk_{false};  // some read was not in the system's cache
  mutable std::mutex mutex_;  // guards asked_
  std::set<std::string, std::less<>> asked_;
};

}  // namespace phalanx::weights
