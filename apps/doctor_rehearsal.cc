#include "apps/doctor_rehearsal.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <thread>

#include "apps/config_environment.h"
#include "apps/cores.h"
#include "apps/host.h"
#include "phalanx/base/clock.h"
#include "phalanx/base/thread_pool.h"
#include "phalanx/net/address.h"
#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/cpu/kernels.h"
#include "phalanx/ops/isa.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

constexpr int64_t kMemory = int64_t{512} << 20;   // read in turn by all ranks of a node
constexpr int64_t kMemoryKept = int64_t{512} << 20;
constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kPlanBytes = 4096;              // as engine::kFirstPieceBytes
constexpr double kConnectSeconds = 10;
constexpr double kOperationSeconds = 20;
constexpr int kLeastSteps = 3;
constexpr int kMostSteps = 2000;
constexpr int kWarmSteps = 2;
constexpr int64_t kMostParts = 16, kMostLayers = 10'000, kMostInputs = 1 << 20;
constexpr int64_t kMostBytes = int64_t{1} << 44;
constexpr int64_t kMostRowBytes = int64_t{64} << 20;

RehearsalPart part_from_json(const json& j) {
  RehearsalPart part{.inputs = j.at("inputs").get<int64_t>(), .bytes = j.at("bytes").get<int64_t>(),
                     .row_bytes = j.at("row_bytes").get<std::vector<int64_t>>()};
  const bool good =
      part.inputs >= 2 && part.inputs <= kMostInputs && part.bytes >= 0 && part.bytes <= kMostBytes &&
      part.row_bytes.size() <= 4096 &&
      std::all_of(part.row_bytes.begin(), part.row_bytes.end(),
                  [](int64_t b) { return b >= 0 && b <= kMostRowBytes; }) &&
      std::accumulate(part.row_bytes.begin(), part.row_bytes.end(), int64_t{0}) <= kMostRowBytes;
  if (!good) throw Error(Code::kInvalidArgument, "a rehearsal with sizes that no model has");
  return part;
}

json part_to_json(const RehearsalPart& part) {
  return {{"inputs", part.inputs}, {"bytes", part.bytes}, {"row_bytes", part.row_bytes}};
}

// The other end of rank 0's shared memory: a thread that takes the logits, looks for the largest and
// hands the next step back.
class HeadThread {
 public:
  explicit HeadThread(const std::vector<std::byte>& logits)
      : logits_(logits), thread_([this] { run(); }) {}
  ~HeadThread() {
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }
  void step() {
    std::unique_lock lock(mutex_);
    asked_ = true;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !asked_; });
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return asked_ || ended_; });
      if (ended_) return;
      const auto* first = reinterpret_cast<const float*>(logits_.data());
      largest_ = *std::max_element(first, first + std::max<size_t>(1, logits_.size() / sizeof(float)));
      asked_ = false;
      changed_.notify_all();
    }
  }

  const std::vector<std::byte>& logits_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool asked_ = false, ended_ = false;
  float largest_ = 0;
  std::thread thread_;
};

// One rank's arithmetic: a matrix times a vector, over memory that is long out of the caches.
class Multiplier {
 public:
  Multiplier(ThreadPool& pool, const ops::cpu::Kernels& kernels, int64_t bytes)
      : pool_(pool), kernels_(kernels),
        region_(bytes / pool.size() / kHugePage * kHugePage),
        memory_(static_cast<std::byte*>(
                    std::aligned_alloc(kHugePage, static_cast<size_t>(region_ * pool.size()))),
                std::free),
        at_(static_cast<size_t>(pool.size())), inputs_(kMostInputs, 1.0f) {
    if (memory_ == nullptr || region_ == 0)
      throw Error(Code::kResourceExhausted, "no 512 MiB of memory for a rehearsal");
    (void)::madvise(memory_.get(), static_cast<size_t>(region_ * pool.size()), MADV_HUGEPAGE);
    pool_.run([&](int t) {
      std::fill_n(reinterpret_cast<uint16_t*>(memory_.get() + t * region_), region_ / 2,
                  uint16_t{0x3f80});
    });
  }

  void multiply(const RehearsalPart& part) {
    const int64_t k = part.inputs / 2 * 2;
    const int64_t panel = k * 16 * 2;  // bf16
    const int64_t panels = (part.bytes + panel - 1) / panel;
    const int64_t share = (panels + pool_.size() - 1) / pool_.size();
    const int64_t most = region_ / panel - 1;  // at once, and one more that the kernel may ask for
    if (most < 1)
      throw Error(Code::kResourceExhausted,
                  fmt::format("a linear layer of {} inputs does not fit the {} that each of {} "
                              "threads rehearses with",
                              k, format_bytes(region_), pool_.size()));
    pool_.run([&](int t) {
      const int64_t mine = std::min(share, panels - t * share);
      for (int64_t done = 0; done < mine;) {
        const int64_t left = std::min(most, mine - done);
        const int64_t count =
            left >= ops::cpu::kWidePanels ? ops::cpu::kWidePanels : std::min(ops::cpu::kGroupPanels, left);
        int64_t& at = at_[static_cast<size_t>(t)];
        if (at + (count + 1) * panel > region_) at = 0;
        alignas(64) float out[16 * ops::cpu::kWidePanels];
        const std::byte* w = memory_.get() + t * region_ + at;
        kernels_.multiply_bf16({.x = inputs_.data(), .x_stride = k, .rows = 1, .w = w,
                                .panel_stride = panel, .panels = count, .k = k, .c = out,
                                .c_stride = 16 * ops::cpu::kWidePanels,
                                .next = w + count * panel});
        at += count * panel;
        done += count;
      }
    });
  }

  void norm(int64_t hidden) {
    const auto n = static_cast<size_t>(std::min<int64_t>(hidden, kMostInputs / 4));
    kernels_.rms_norm(inputs_.data(), inputs_.data() + n, 1e-5f, nullptr, static_cast<int64_t>(n),
                      normed_.data(), false);
  }

 private:
  ThreadPool& pool_;
  const ops::cpu::Kernels& kernels_;
  int64_t region_;  // bytes of each thread
  std::unique_ptr<std::byte, void (*)(void*)> memory_;
  std::vector<int64_t> at_;
  std::vector<float> inputs_;
  std::vector<float> normed_ = std::vector<float>(kMostInputs / 4);
};

int64_t largest_row(const RehearsalWork& work) {
  int64_t bytes = 64;
  const auto see = [&](const RehearsalPart& part) {
    bytes = std::max(bytes, std::accumulate(part.row_bytes.begin(), part.row_bytes.end(), int64_t{0}));
  };
  for (const RehearsalPart& part : work.parts) see(part);
  see(work.head);
  return bytes;
}

RehearsalResult run_rank(comm::Group& group, Multiplier& multiplier, const RehearsalWork& work,
                         double seconds) {
  std::vector<std::byte> row(static_cast<size_t>(largest_row(work)));
  std::vector<std::byte> plan(kPlanBytes);
  std::optional<HeadThread> head;
  if (group.rank() == 0) head.emplace(row);
  std::vector<double> steps;
  int64_t compute_ns = 0;
  const Deadline end = Deadline::in_seconds(seconds);
  for (int step = 0; step < kMostSteps; ++step) {
    const int64_t begin = now_ns();
    if (head) head->step();
    const bool more = step < kWarmSteps + kLeastSteps || !end.passed();
    plan[0] = static_cast<std::byte>(more);
    group.broadcast(plan, 0);
    if (plan[0] == std::byte{0}) break;
    const comm::GroupStats before = group.stats();
    const int64_t started = now_ns();
    for (int64_t layer = 0; layer < work.layers; ++layer) {
      multiplier.norm(work.hidden);
      for (const RehearsalPart& part : work.parts) {
        multiplier.multiply(part);
        if (!part.row_bytes.empty()) group.all_gather(row.data(), 1, part.row_bytes);
      }
      multiplier.norm(work.hidden);
    }
    multiplier.multiply(work.head);
    if (!work.head.row_bytes.empty()) group.gather(row.data(), 1, work.head.row_bytes, 0);
    const int64_t ended = now_ns();
    if (step < kWarmSteps) continue;
    const comm::GroupStats after = group.stats();
    compute_ns += ended - started - static_cast<int64_t>(after.wait_ns - before.wait_ns) -
                  static_cast<int64_t>(after.transfer_ns - before.transfer_ns);
    steps.push_back(static_cast<double>(ended - begin) * 1e-9);
  }
  if (steps.empty()) throw Error(Code::kInternal, "a rehearsal without a step");
  const auto count = static_cast<double>(steps.size());
  std::nth_element(steps.begin(), steps.begin() + std::ssize(steps) / 2, steps.end());
  return {.steps = static_cast<int>(steps.size()),
          .step_s = steps[steps.size() / 2],
          .compute_s = static_cast<double>(compute_ns) * 1e-9 / count};
}

const ops::cpu::Kernels& best_kernels() {
  const ops::cpu::Kernels* kernels = ops::cpu::kernels_of(ops::choose_isa());
  if (kernels == nullptr)
    throw Error(Code::kInvalidArgument,
                "PHALANX_CPU_ISA=ref: nothing is predicted for the reference. Fix: name another path or "
                "none");
  return *kernels;
}

}  // namespace

json to_json(const RehearsalWork& work) {
  json parts = json::array();
  for (const RehearsalPart& part : work.parts) parts.push_back(part_to_json(part));
  return {{"layers", work.layers}, {"hidden", work.hidden}, {"parts", parts},
          {"head", part_to_json(work.head)}};
}

RehearsalWork rehearsal_work_from_json(const json& j) {
  RehearsalWork work{.layers = j.at("layers").get<int64_t>(), .hidden = j.at("hidden").get<int64_t>()};
  const auto& parts = j.at("parts").get_ref<const json::array_t&>();
  if (work.layers < 1 || work.layers > kMostLayers || work.hidden < 1 || work.hidden > kMostInputs ||
      static_cast<int64_t>(parts.size()) > kMostParts)
    throw Error(Code::kInvalidArgument, "a rehearsal with sizes that no model has");
  for (const json& part : parts) work.parts.push_back(part_from_json(part));
  work.head = part_from_json(j.at("head"));
  return work;
}

struct Rehearsal::State {
  DoctorOptions options;
  std::vector<int> ranks;
  CorePlan cores;
  std::vector<UniqueFd> opened;
  std::vector<int> listeners;  // by rank of this node; empty for a single rank
  std::vector<uint16_t> ports;
  UniqueFd node_memory;
};

Rehearsal::Rehearsal(const DoctorOptions& options, std::vector<int> ranks, int total,
                     const std::vector<Port>& data)
    : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.options = options;
  s.ranks = std::move(ranks);
  NodeConfig config;
  Problems ignored;  // a bad variable is `phalanx check`'s to name
  read_environment(process_environment(), config, ignored);
  const HostResources host = host_resources();
  if (host.memory_bytes < kMemory + kMemoryKept)
    throw Error(Code::kResourceExhausted,
                fmt::format("only {} of memory are free, a rehearsal needs {}",
                            format_bytes(host.memory_bytes), format_bytes(kMemory + kMemoryKept)));
  int sharing = 0;
  for (int rank = 0; rank < total; ++rank)
    sharing += net::is_local(options.address(options.table.server_of_rank(rank))) ? 1 : 0;
  const auto local = static_cast<int>(s.ranks.size());
  s.cores = plan_cores({.ranks = local,
                        .sharing = std::max(sharing, local),
                        .threads_per_rank = config.threads_per_rank,
                        .cpus = config.cpus,
                        .lease_folder = default_lease_folder()},
                       host, read_topology(host.cpus));
  if (local > 1) s.node_memory = comm::create_node_memory(local);
  for (size_t i = 0; i < s.ranks.size() && local < total; ++i) {
    Port port = i < data.size() ? data[i] : Port{};
    if (port.listener < 0) {
      s.opened.push_back(comm::listen_on(options.address(options.own_server), 0, 0, &port.number));
      port.listener = s.opened.back().get();
    }
    s.listeners.push_back(port.listener);
    s.ports.push_back(port.number);
  }
  s.ports.resize(s.ranks.size());
}

Rehearsal::~Rehearsal() = default;

const std::vector<uint16_t>& Rehearsal::ports() const { return state_->ports; }

std::vector<RehearsalResult> Rehearsal::run(const std::vector<comm::Member>& members,
                                            const comm::Token& token,
                                            const std::vector<RehearsalWork>& works, double seconds) {
  State& s = *state_;
  if (works.size() != s.ranks.size())
    throw Error(Code::kInvalidArgument, "a rehearsal needs the work of each rank");
  const ops::cpu::Kernels& kernels = best_kernels();
  std::vector<RehearsalResult> results(s.ranks.size());
  std::mutex mutex;
  std::optional<Error> failure;  // the first
  const auto run_one = [&](size_t i) {
    try {
      const int threads = s.cores.threads_per_rank;
      std::vector<int> cpus;
      if (!s.cores.cpus.empty()) {
        const auto first = s.cores.cpus.begin() + static_cast<std::ptrdiff_t>(i) * threads;
        cpus.assign(first, first + threads);
      }
      ThreadPool pool({.threads = threads, .cpus = cpus});
      Multiplier multiplier(pool, kernels, kMemory / static_cast<int64_t>(s.ranks.size()));
      const std::unique_ptr<comm::Group> group =
          members.size() == 1
              ? comm::single_group()
              : comm::form_group({.members = members,
                                  .rank = s.ranks[i],
                                  .generation = 1,
                                  .token = token,
                                  .tls = s.options.tls,
                                  .connect_seconds = kConnectSeconds,
                                  .operation_seconds = kOperationSeconds},
                                 s.listeners.empty() ? -1 : s.listeners[i],
                                 s.node_memory.valid() ? s.node_memory.get() : -1);
      results[i] = run_rank(*group, multiplier, works[i], seconds);
    } catch (const std::exception& e) {
      const std::lock_guard lock(mutex);
      if (!failure) failure.emplace(Code::kUnavailable, e.what());
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 0; i < s.ranks.size(); ++i) threads.emplace_back(run_one, i);
  for (std::thread& thread : threads) thread.join();
  if (failure) throw Error(*failure);
  return results;
}

}  // namespace phalanx::apps
