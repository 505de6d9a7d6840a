#include "phalanx/engine/step_channel.h"

#include <fmt/format.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <ctime>
#include <optional>
#include <string_view>

#include "phalanx/base/error.h"
#include "phalanx/base/sealed_memory.h"
#include "phalanx/engine/draft_order.h"

namespace phalanx::engine {

namespace {

constexpr int64_t kControlBytes = 8192;
constexpr int64_t kMessageBytes = 1024;
constexpr int64_t kSpinNs = 50'000;
constexpr int64_t kSliceNs = 50'000'000;

// A word one side rings and the other waits on.
struct alignas(64) Bell {
  std::atomic<uint32_t> count{0};
  std::atomic<uint32_t> waiting{0};
};

// A message written once by whoever comes first.
struct alignas(64) Notice {
  enum : uint32_t { kEmpty = 0, kWriting = 1, kReady = 2 };
  std::atomic<uint32_t> state{kEmpty};
  std::array<char, kMessageBytes> text{};
};

// The first 8 KiB of the memfd. All zeros is the state before the first plan.
struct Control {
  Bell to_rank;  // rung by the head: a plan, an abort
  std::atomic<uint64_t> plans{0};       // sent so far
  std::atomic<uint64_t> plan_bytes{0};  // of the last one
  std::atomic<uint64_t> order_bytes{0};  // of its draft order

  Bell to_head;  // rung by rank 0: a result, a failure, an abort
  // Odd while the result is being written.
  std::atomic<uint64_t> results{0};
  std::atomic<uint64_t> generation{0}, step{0};
  std::atomic<int64_t> total_ns{0}, compute_ns{0}, communication_ns{0}, draft_ns{0};

  Notice failure;  // by rank 0
  Notice aborted;  // by either side
};
static_assert(sizeof(Control) <= kControlBytes);
static_assert(std::atomic<uint32_t>::is_always_lock_free &&
              std::atomic<uint64_t>::is_always_lock_free);

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

int64_t plan_area_bytes(const StepLimits& limits) {
  return round_up(limits.max_plan_bytes(), 4096);
}

int64_t logits_area_bytes(const StepLimits& limits) {
  return round_up(limits.max_rows * limits.vocab_size * static_cast<int64_t>(sizeof(float)), 4096);
}

int64_t order_area_bytes(const StepLimits& limits) {
  return round_up(max_draft_order_bytes(limits), 64);
}

int64_t guess_count(const StepLimits& limits) {
  return limits.draft_sequences > 0 ? limits.max_rows : 0;
}

// A futex that works between processes (no FUTEX_PRIVATE_FLAG).
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, int64_t ns) {
  const timespec slice{.tv_sec = ns / 1'000'000'000, .tv_nsec = ns % 1'000'000'000};
  ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &slice, nullptr, 0);
}

void ring(Bell& bell) {
  bell.count.fetch_add(1, std::memory_order_seq_cst);
  if (bell.waiting.load(std::memory_order_seq_cst) != 0) {
    ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(&bell.count), FUTEX_WAKE, INT32_MAX, nullptr,
              nullptr, 0);
  }
}

// Returns when ready() holds (true) or the deadline has passed (false). ready() may throw.
template <typename Ready>
bool wait_for(Bell& bell, Deadline deadline, Ready&& ready) {
  const int64_t begin = now_ns();
  const int64_t end =
      std::chrono::duration_cast<std::chrono::nanoseconds>(deadline.when().time_since_epoch())
          .count();
  for (;;) {
    const uint32_t seen = bell.count.load(std::memory_order_seq_cst);
    if (ready()) return true;
    const int64_t now = now_ns();
    if (now >= end) return false;
    if (now - begin < kSpinNs) {
      __builtin_ia32_pause();
      continue;
    }
    bell.waiting.store(1, std::memory_order_seq_cst);
    futex_wait(bell.count, seen, std::min(kSliceNs, end - now));
    bell.waiting.store(0, std::memory_order_seq_cst);
  }
}

void post(Notice& notice, std::string_view message) noexcept {
  uint32_t expected = Notice::kEmpty;
  if (!notice.state.compare_exchange_strong(expected, Notice::kWriting)) return;
  const size_t size = std::min(message.size(), notice.text.size() - 1);
  std::memcpy(notice.text.data(), message.data(), size);
  notice.text[size] = '\0';
  notice.state.store(Notice::kReady, std::memory_order_release);
}

std::optional<std::string> read(const Notice& notice) {
  if (notice.state.load(std::memory_order_acquire) != Notice::kReady) return std::nullopt;
  return std::string(notice.text.data(), ::strnlen(notice.text.data(), notice.text.size()));
}

// The memfd as one side sees it.
struct Area {
  Area(int memfd, const StepLimits& limits)
      : limits(limits), mapping(memfd, step_channel_bytes(limits), "step channel") {}

  [[nodiscard]] Control& control() const { return *reinterpret_cast<Control*>(mapping.data()); }
  [[nodiscard]] std::byte* plan() const { return mapping.data() + kControlBytes; }
  [[nodiscard]] float* logits() const {
    return reinterpret_cast<float*>(plan() + plan_area_bytes(limits));
  }
  [[nodiscard]] std::span<RankTrace> traces() const {
    return {reinterpret_cast<RankTrace*>(plan() + plan_area_bytes(limits) +
                                         logits_area_bytes(limits)),
            static_cast<size_t>(limits.ranks)};
  }
  [[nodiscard]] std::span<AdapterReport> adapter_reports() const {
    return {reinterpret_cast<AdapterReport*>(traces().data() + limits.ranks),
            limits.max_adapters > 0 ? static_cast<size_t>(limits.ranks) : 0};
  }
  [[nodiscard]] std::byte* order() const {
    return reinterpret_cast<std::byte*>(traces().data() + traces().size()) +
           adapter_reports().size_bytes();
  }
  [[nodiscard]] std::span<int32_t> guesses() const {
    return {reinterpret_cast<int32_t*>(order() + order_area_bytes(limits)),
            static_cast<size_t>(guess_count(limits))};
  }
  void abort(const std::string& reason) const noexcept {
    post(control().aborted, reason);
    ring(control().to_head);
    ring(control().to_rank);
  }
  void throw_if_aborted() const {
    if (control().aborted.state.load(std::memory_order_acquire) != Notice::kReady) return;
    throw Error(Code::kAborted,
                fmt::format("the step channel was aborted: {}", *read(control().aborted)));
  }

  const StepLimits limits;
  const SealedMapping mapping;
};

}  // namespace

int64_t step_channel_bytes(const StepLimits& limits) {
  return kControlBytes + plan_area_bytes(limits) + logits_area_bytes(limits) +
         limits.ranks * static_cast<int64_t>(sizeof(RankTrace)) + order_area_bytes(limits) +
         guess_count(limits) * static_cast<int64_t>(sizeof(int32_t)) +
         (limits.max_adapters > 0 ? limits.ranks * static_cast<int64_t>(sizeof(AdapterReport)) : 0);
}

UniqueFd create_step_channel(const StepLimits& limits) {
  return create_sealed_memory("phalanx-step-channel", step_channel_bytes(limits));
}

// --- Head ------------------------------------------------------------------------------------

struct StepChannelHead::State {
  State(int memfd, const StepLimits& limits) : area(memfd, limits) {}

  void throw_if_failed() const {
    if (auto message = read(area.control().failure)) throw Error(Code::kUnavailable, *message);
    area.throw_if_aborted();
  }

  // True when the result of the outstanding step lies there. Results are read between two equal
  // even values of the counter, so that one that is being overwritten is not believed.
  bool take_result(StepTiming* timing) {
    const Control& c = area.control();
    const uint64_t before = c.results.load(std::memory_order_acquire);
    if (before == results_seen || before % 2 != 0) return false;
    const uint64_t generation = c.generation.load(std::memory_order_acquire);
    const uint64_t step = c.step.load(std::memory_order_acquire);
    const StepTiming read_timing{
        .total_ns = c.total_ns.load(std::memory_order_acquire),
        .compute_ns = c.compute_ns.load(std::memory_order_acquire),
        .communication_ns = c.communication_ns.load(std::memory_order_acquire),
        .draft_ns = c.draft_ns.load(std::memory_order_acquire)};
    if (c.results.load(std::memory_order_acquire) != before) return false;
    results_seen = before;
    if (generation != sent.generation || step != sent.step) return false;
    if (timing != nullptr) *timing = read_timing;
    return true;
  }

  Area area;
  StepPlanHeader sent;
  bool outstanding = false;
  uint64_t results_seen = 0;
};

StepChannelHead::StepChannelHead(int memfd, const StepLimits& limits)
    : state_(std::make_unique<State>(memfd, limits)) {}

StepChannelHead::~StepChannelHead() = default;

void StepChannelHead::send(std::span<const std::byte> plan,
                           std::span<const std::byte> draft_order) {
  State& s = *state_;
  s.throw_if_failed();
  if (s.outstanding) {
    throw Error(Code::kFailedPrecondition,
                fmt::format("step {} is still outstanding", s.sent.step));
  }
  const int64_t capacity = plan_area_bytes(s.area.limits);
  if (plan.size() < sizeof(StepPlanHeader) || static_cast<int64_t>(plan.size()) > capacity) {
    throw Error(Code::kInvalidArgument,
                fmt::format("a step plan of {} bytes cannot be sent, expected {} to {}",
                            plan.size(), sizeof(StepPlanHeader), capacity));
  }
  const int64_t order_capacity = max_draft_order_bytes(s.area.limits);
  if (static_cast<int64_t>(draft_order.size()) > order_capacity) {
    throw Error(Code::kInvalidArgument,
                fmt::format("a draft order of {} bytes cannot be sent, expected at most {}",
                            draft_order.size(), order_capacity));
  }
  std::memcpy(&s.sent, plan.data(), sizeof(s.sent));
  if (s.sent.num_rows > s.area.limits.max_rows) {
    throw Error(Code::kInvalidArgument,
                fmt::format("a step plan asks for {} rows of logits, at most {} fit",
                            s.sent.num_rows, s.area.limits.max_rows));
  }
  Control& c = s.area.control();
  std::memcpy(s.area.plan(), plan.data(), plan.size());
  c.plan_bytes.store(plan.size(), std::memory_order_relaxed);
  if (!draft_order.empty()) std::memcpy(s.area.order(), draft_order.data(), draft_order.size());
  c.order_bytes.store(draft_order.size(), std::memory_order_relaxed);
  s.results_seen = c.results.load(std::memory_order_acquire) & ~uint64_t{1};
  s.outstanding = true;
  c.plans.fetch_add(1, std::memory_order_release);
  ring(c.to_rank);
}

std::span<const float> StepChannelHead::wait_logits(Deadline deadline, StepTiming* timing) {
  State& s = *state_;
  if (!s.outstanding) throw Error(Code::kFailedPrecondition, "no step is outstanding");
  const int64_t begin = now_ns();
  const bool answered = wait_for(s.area.control().to_head, deadline, [&] {
    s.throw_if_failed();
    return s.take_result(timing);
  });
  if (!answered) {
    throw Error(Code::kDeadlineExceeded,
                fmt::format("rank 0 did not answer step {} of generation {} within {:.1f} s",
                            s.sent.step, s.sent.generation,
                            static_cast<double>(now_ns() - begin) * 1e-9));
  }
  s.outstanding = false;
  return {s.area.logits(),
          static_cast<size_t>(int64_t{s.sent.num_rows} * s.area.limits.vocab_size)};
}

std::span<const RankTrace> StepChannelHead::traces() const { return state_->area.traces(); }

std::span<const int32_t> StepChannelHead::guesses() const { return state_->area.guesses(); }

std::span<const AdapterReport> StepChannelHead::adapter_reports() const {
  return state_->area.adapter_reports();
}

void StepChannelHead::abort(const std::string& reason) noexcept { state_->area.abort(reason); }

// --- Rank 0 ----------------------------------------------------------------------------------

struct StepChannelRank::State {
  State(int memfd, const StepLimits& limits) : area(memfd, limits) {}
  Area area;
  uint64_t plans_seen = 0;
};

StepChannelRank::StepChannelRank(int memfd, const StepLimits& limits)
    : state_(std::make_unique<State>(memfd, limits)) {}

StepChannelRank::~StepChannelRank() = default;

std::span<const std::byte> StepChannelRank::wait_plan(Deadline deadline) {
  State& s = *state_;
  Control& c = s.area.control();
  const bool arrived = wait_for(c.to_rank, deadline, [&] {
    s.area.throw_if_aborted();
    return c.plans.load(std::memory_order_acquire) != s.plans_seen;
  });
  if (!arrived) return {};
  s.plans_seen = c.plans.load(std::memory_order_acquire);
  const uint64_t bytes = c.plan_bytes.load(std::memory_order_relaxed);
  if (static_cast<int64_t>(bytes) > plan_area_bytes(s.area.limits)) {
    throw Error(Code::kDataLoss, fmt::format("step channel: a plan of {} bytes, at most {} fit",
                                             bytes, plan_area_bytes(s.area.limits)));
  }
  return {s.area.plan(), static_cast<size_t>(bytes)};
}

std::span<const std::byte> StepChannelRank::draft_order() const {
  const Area& area = state_->area;
  const uint64_t bytes = area.control().order_bytes.load(std::memory_order_relaxed);
  if (static_cast<int64_t>(bytes) > max_draft_order_bytes(area.limits)) {
    throw Error(Code::kDataLoss,
                fmt::format("step channel: a draft order of {} bytes, at most {} fit", bytes,
                            max_draft_order_bytes(area.limits)));
  }
  return {area.order(), static_cast<size_t>(bytes)};
}

std::span<int32_t> StepChannelRank::guesses() { return state_->area.guesses(); }

float* StepChannelRank::logits() { return state_->area.logits(); }

std::span<RankTrace> StepChannelRank::traces() { return state_->area.traces(); }

std::span<AdapterReport> StepChannelRank::adapter_reports() {
  return state_->area.adapter_reports();
}

void StepChannelRank::publish(uint64_t generation, uint64_t step, const StepTiming& timing) {
  Control& c = state_->area.control();
  const uint64_t odd = c.results.load(std::memory_order_relaxed) + 1;
  c.results.store(odd, std::memory_order_relaxed);
  c.generation.store(generation, std::memory_order_release);
  c.step.store(step, std::memory_order_release);
  c.total_ns.store(timing.total_ns, std::memory_order_release);
  c.compute_ns.store(timing.compute_ns, std::memory_order_release);
  c.communication_ns.store(timing.communication_ns, std::memory_order_release);
  c.draft_ns.store(timing.draft_ns, std::memory_order_release);
  c.results.store(odd + 1, std::memory_order_release);
  ring(c.to_head);
}

void StepChannelRank::fail(const std::string& message) noexcept {
  post(state_->area.control().failure, message);
  ring(state_->area.control().to_head);
}

void StepChannelRank::abort(const std::string& reason) noexcept { state_->area.abort(reason); }

}  // namespace phalanx::engine
