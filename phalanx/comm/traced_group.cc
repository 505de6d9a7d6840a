#include "phalanx/comm/traced_group.h"

#include <numeric>

#include "phalanx/base/clock.h"

namespace phalanx::comm {

namespace {

int64_t matrix_bytes(int64_t rows, std::span<const int64_t> row_bytes) {
  return rows * std::accumulate(row_bytes.begin(), row_bytes.end(), int64_t{0});
}

}  // namespace

void TracedGroup::start() {
  events_.clear();
  events_.reserve(kMaxEvents);
  dropped_ = 0;
  recording_ = true;
}

template <typename Operation>
void TracedGroup::run(int64_t bytes, Operation&& operation) {
  if (!recording_) return operation();
  if (events_.size() == kMaxEvents) {
    ++dropped_;
    return operation();
  }
  const auto waited = static_cast<int64_t>(group_.stats().wait_ns);
  const int64_t begin = now_ns();
  operation();
  events_.push_back({.begin_ns = begin,
                     .end_ns = now_ns(),
                     .wait_ns = static_cast<int64_t>(group_.stats().wait_ns) - waited,
                     .bytes = bytes});
}

void TracedGroup::all_gather(std::byte* matrix, int64_t rows, std::span<const int64_t> row_bytes) {
  run(matrix_bytes(rows, row_bytes), [&] { group_.all_gather(matrix, rows, row_bytes); });
}

void TracedGroup::gather(std::byte* matrix, int64_t rows, std::span<const int64_t> row_bytes,
                         int root) {
  run(matrix_bytes(rows, row_bytes), [&] { group_.gather(matrix, rows, row_bytes, root); });
}

void TracedGroup::broadcast(std::span<std::byte> bytes, int root) {
  run(std::ssize(bytes), [&] { group_.broadcast(bytes, root); });
}

void TracedGroup::all_reduce(std::span<float> values) {
  run(std::ssize(values) * static_cast<int64_t>(sizeof(float)), [&] { group_.all_reduce(values); });
}

void TracedGroup::barrier() {
  run(0, [&] { group_.barrier(); });
}

}  // namespace phalanx::comm
