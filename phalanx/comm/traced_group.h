#pragma once

#include <vector>

#include "phalanx/comm/group.h"

namespace phalanx::comm {

// One collective operation as this rank saw it.
struct CollectiveEvent {
  int64_t begin_ns = 0;  // now_ns()
  int64_t end_ns = 0;
  int64_t wait_ns = 0;   // of it, for a peer that had not arrived yet
  int64_t bytes = 0;     // of the whole result
};

// A group that can tell when it did what. Recording is off until start(); then every operation
// leaves one event, at most kMaxEvents. Like the group itself: one thread, but abort() any.
class TracedGroup final : public Group {
 public:
  explicit TracedGroup(Group& group) : group_(group) {}

  void start();
  void stop() { recording_ = false; }
  [[nodiscard]] const std::vector<CollectiveEvent>& events() const { return events_; }
  [[nodiscard]] int64_t dropped() const { return dropped_; }  // beyond kMaxEvents

  [[nodiscard]] int rank() const override { return group_.rank(); }
  [[nodiscard]] int size() const override { return group_.size(); }
  void all_gather(std::byte* matrix, int64_t rows, std::span<const int64_t> row_bytes) override;
  void gather(std::byte* matrix, int64_t rows, std::span<const int64_t> row_bytes,
              int root) override;
  void broadcast(std::span<std::byte> bytes, int root) override;
  void all_reduce(std::span<float> values) override;
  void barrier() override;
  void abort(const char* reason) noexcept override { group_.abort(reason); }
  [[nodiscard]] GroupStats stats() const override { return group_.stats(); }

  static constexpr size_t kMaxEvents = 1023;

 private:
  template <typename Operation>
  void run(int64_t bytes, Operation&& operation);

  Group& group_;
  bool recording_ = false;
  std::vector<CollectiveEvent> events_;
  int64_t dropped_ = 0;
};

}  // namespace phalanx::comm
