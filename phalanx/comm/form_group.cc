#include <atomic>
#include <mutex>
#include <optional>
#include <random>

#include "phalanx/base/error.h"
#include "phalanx/comm/bootstrap.h"
#include "phalanx/comm/hierarchical_group.h"

namespace phalanx::comm {

namespace {

class SingleGroup final : public Group {
 public:
  [[nodiscard]] int rank() const override { return 0; }
  [[nodiscard]] int size() const override { return 1; }
  void all_gather(std::byte*, int64_t, std::span<const int64_t>) override { count(); }
  void gather(std::byte*, int64_t, std::span<const int64_t>, int) override { count(); }
  void broadcast(std::span<std::byte>, int) override { count(); }
  void all_reduce(std::span<float>) override { count(); }
  void barrier() override { count(); }
  void abort(const char* reason) noexcept override {
    const std::lock_guard lock(mutex_);
    if (!reason_) reason_ = reason;
    dead_.store(true, std::memory_order_release);
  }
  [[nodiscard]] GroupStats stats() const override { return stats_; }

 private:
  void count() {
    if (dead_.load(std::memory_order_acquire)) {
      const std::lock_guard lock(mutex_);
      throw Error(Code::kAborted, "rank 0 aborted the group: " + *reason_);
    }
    ++stats_.operations;
  }

  GroupStats stats_;
  std::atomic<bool> dead_{false};
  std::mutex mutex_;
  std::optional<std::string> reason_;  // guarded by mutex_
};

}  // namespace

Token random_token() {
  std::random_device random;
  Token token{};
  for (std::byte& byte : token) byte = static_cast<std::byte>(random() & 0xff);
  return token;
}

std::unique_ptr<Group> form_group(const GroupOptions& options, int listener, int node_memory) {
  if (options.members.size() == 1) {
    (void)make_topology(options.members, options.rank);
    return single_group();
  }
  return std::make_unique<HierarchicalGroup>(options, listener, node_memory);
}

std::unique_ptr<Group> single_group() { return std::make_unique<SingleGroup>(); }

}  // namespace phalanx::comm
