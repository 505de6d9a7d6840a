#include "apps/rank_supervisor.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <condition_variable>
#include <cstring>
#include <ctime>
#include <deque>
#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "apps/message_socket.h"
#include "phalanx/base/error.h"
#include "phalanx/base/log.h"
#include "phalanx/base/sealed_memory.h"

extern char** environ;

namespace phalanx::apps {
namespace {

using nlohmann::json;

constexpr auto kLookEvery = std::chrono::milliseconds(250);
// A process that waits for its disk uses no CPU time either: loading from slow storage is no fault.
constexpr double kDiskFactor = 20;

struct RankProcess {
  int rank = 0;
  pid_t pid = -1;
  UniqueFd pidfd;
  std::unique_ptr<MessageSocket> socket;
  UniqueFd page_fd;
  SealedMapping page_mapping;
  engine::RankPage* page = nullptr;
  std::string state = "starting";
  std::deque<json> answers;
  std::optional<Error> error;  // as the rank reported it
  bool ended = false;
  int status = 0;
  int64_t cpu_ns = -1;  // of all its threads, when it last changed
  Clock::time_point cpu_changed;
  std::mutex send_mutex;
};

// CPU time of all threads of a process; -1 when it cannot be read.
int64_t cpu_time_ns(pid_t pid) {
  clockid_t clock{};
  timespec time{};
  if (::clock_getcpuclockid(pid, &clock) != 0 || ::clock_gettime(clock, &time) != 0) return -1;
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

// As in /proc/PID/stat: R, S, D, T (stopped), t (by a debugger), Z; '?' when it cannot be read.
char process_state(pid_t pid) {
  std::ifstream file(fmt::format("/proc/{}/stat", pid));
  std::string text;
  std::getline(file, text);
  const size_t name_end = text.rfind(')');
  return name_end != std::string::npos && name_end + 2 < text.size() ? text[name_end + 2] : '?';
}

std::string how_it_ended(int status) {
  if (WIFSIGNALED(status)) {
    const char* hint = WTERMSIG(status) == SIGKILL ? ", perhaps by the kernel's out-of-memory killer"
                                                   : "";
    return fmt::format("was killed by signal {} ({}{})", WTERMSIG(status),
                       strsignal(WTERMSIG(status)), hint);
  }
  return fmt::format("ended with status {}", WEXITSTATUS(status));
}

// Moves every source above the targets first, so that no dup2 overwrites a source.
pid_t spawn_rank(const std::vector<std::pair<int, int>>& source_to_target, int rank) {
  std::vector<UniqueFd> raised;
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  for (const auto& [source, target] : source_to_target) {
    raised.emplace_back(::fcntl(source, F_DUPFD_CLOEXEC, 64));
    if (!raised.back().valid()) {
      posix_spawn_file_actions_destroy(&actions);
      throw Error(Code::kResourceExhausted,
                  fmt::format("cannot start rank {}: {}", rank, std::strerror(errno)));
    }
    posix_spawn_file_actions_adddup2(&actions, raised.back().get(), target);
  }
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  sigset_t none;
  sigemptyset(&none);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
  std::string number = std::to_string(rank);
  char name[] = "phalanx";
  char command[] = "rank";
  char* const argv[] = {name, command, number.data(), nullptr};
  pid_t pid = -1;
  const int failed = ::posix_spawn(&pid, "/proc/self/exe", &actions, &attributes, argv, environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  if (failed != 0)
    throw Error(Code::kResourceExhausted,
                fmt::format("cannot start rank {}: {}", rank, std::strerror(failed)));
  return pid;
}

}  // namespace

struct RankSupervisor::State {
  State(std::string n, double stuck, OnFault fault)
      : node(std::move(n)), stuck_seconds(stuck), on_fault(std::move(fault)) {}

  std::string node;
  double stuck_seconds;
  OnFault on_fault;
  Clock::time_point looked = Clock::now();
  UniqueFd wake{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  mutable std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::unique_ptr<RankProcess>> ranks;
  const std::vector<RankStart>* to_start = nullptr;
  std::optional<Error> start_error;
  bool calling = false;    // errors belong to the caller of call()
  bool stopping = false;   // ends with status 0 are expected
  bool aborted = false;
  bool fault_told = false;
  bool cause_told = false;  // a definite one, perhaps after its echo
  bool quit = false;
  std::thread thread;

  void nudge() const {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = ::write(wake.get(), &one, sizeof one);
  }

  void send(RankProcess& rank, const json& message) {
    const std::lock_guard lock(rank.send_mutex);
    rank.socket->send(message);
  }

  void send_abort(const std::string& reason) {
    for (const auto& rank : ranks) {
      if (rank->ended) continue;
      try {
        send(*rank, {{"op", "abort"}, {"reason", reason}});
      } catch (const std::exception&) {
        // It is ending; its pidfd will tell.
      }
    }
  }

  void spawn_all() {
    std::vector<std::unique_ptr<RankProcess>> started;
    try {
      for (const RankStart& start : *to_start) {
        auto process = std::make_unique<RankProcess>();
        process->rank = start.spec.model.rank;
        process->page_fd = engine::create_rank_page();
        process->page = engine::map_rank_page(process->page_fd.get(), process->page_mapping);
        auto [mine, theirs] = MessageSocket::make_pair();
        std::vector<std::pair<int, int>> fds = {{theirs.get(), kControlFd},
                                                {process->page_fd.get(), kPageFd}};
        if (start.listener >= 0) fds.emplace_back(start.listener, kListenerFd);
        if (start.node_memory >= 0) fds.emplace_back(start.node_memory, kNodeMemoryFd);
        if (start.step_channel >= 0) fds.emplace_back(start.step_channel, kStepChannelFd);
        if (start.arena >= 0) fds.emplace_back(start.arena, kArenaFd);
        if (start.draft_arena >= 0) fds.emplace_back(start.draft_arena, kDraftArenaFd);
        process->pid = spawn_rank(fds, process->rank);
        process->pidfd.reset(static_cast<int>(::syscall(SYS_pidfd_open, process->pid, 0)));
        process->socket = std::make_unique<MessageSocket>(std::move(mine));
        started.push_back(std::move(process));
        send(*started.back(), {{"op", "start"}, {"spec", to_json(start.spec)}});
      }
    } catch (const Error& e) {
      start_error = e;
    }
    const std::lock_guard lock(mutex);
    for (auto& process : started) ranks.push_back(std::move(process));
    to_start = nullptr;
    changed.notify_all();
  }

  // True if something came.
  void read_messages(RankProcess& rank) {
    try {
      std::optional<json> message = rank.socket->receive(Deadline::in_seconds(0));
      if (!message) return;
      const std::lock_guard lock(mutex);
      const std::string event = message->at("event").get<std::string>();
      if (event == "error") {
        rank.error = Error(static_cast<Code>(message->at("code").get<int>()),
                           message->at("message").get<std::string>());
      } else {
        rank.state = event;
        rank.answers.push_back(std::move(*message));
      }
      changed.notify_all();
    } catch (const Error& e) {
      if (e.code() == Code::kDeadlineExceeded) return;
      const std::lock_guard lock(mutex);
      if (!rank.error) rank.error = e;
      changed.notify_all();
    }
  }

  void reap(RankProcess& rank) {
    // What it said last may still be in the socket.
    read_messages(rank);
    int status = 0;
    if (::waitpid(rank.pid, &status, WNOHANG) != rank.pid) return;
    const std::lock_guard lock(mutex);
    // The last step tells the ranks to leave, and may overtake the master's word to the node.
    const bool in_order = rank.state == "stopped";
    rank.ended = true;
    rank.status = status;
    rank.state = "ended";
    if (!rank.error && !(WIFEXITED(status) && WEXITSTATUS(status) == 0))
      rank.error = Error(Code::kUnavailable,
                         fmt::format("rank {} (pid {}) {}", rank.rank, rank.pid, how_it_ended(status)));
    else if (!rank.error && !stopping && !in_order)
      rank.error = Error(Code::kUnavailable,
                         fmt::format("rank {} (pid {}) left unexpectedly", rank.rank, rank.pid));
    changed.notify_all();
  }

  // The most telling error: a rank that was killed says more than those it took along.
  static bool killed(const RankProcess& r) { return r.ended && WIFSIGNALED(r.status); }
  std::optional<Error> first_error() const {
    const auto own = [](const RankProcess& r) { return r.error->code() != Code::kAborted; };
    for (const auto& rank : ranks)
      if (rank->error && (killed(*rank) || rank->state == "stuck")) return place(*rank);
    for (const auto& rank : ranks)
      if (rank->error && own(*rank)) return place(*rank);
    for (const auto& rank : ranks)
      if (rank->error) return place(*rank);
    return std::nullopt;
  }
  // The rank's error with node and rank before it.
  Error place(const RankProcess& rank) const {
    const std::string text = rank.error->what();
    const std::string name = fmt::format("rank {}", rank.rank);
    return {rank.error->code(),
            text.starts_with(name) ? fmt::format("{}: {}", node, text)
                                   : fmt::format("{}: {}: {}", node, name, text)};
  }

  // A healthy rank wakes several times a second, whatever it waits for. One that had no CPU time for
  // stuck_seconds is frozen, unless this process was held up itself.
  void look_for_stuck() {
    const auto now = Clock::now();
    if (stuck_seconds <= 0 || now - looked < kLookEvery) return;
    const bool held_up = now - looked > 4 * kLookEvery;
    looked = now;
    for (const auto& rank : ranks) {
      if (rank->ended || rank->error) continue;
      const int64_t cpu_ns = cpu_time_ns(rank->pid);
      if (cpu_ns != rank->cpu_ns || held_up) {
        rank->cpu_ns = cpu_ns;
        rank->cpu_changed = now;
        continue;
      }
      const double still = std::chrono::duration<double>(now - rank->cpu_changed).count();
      if (still < stuck_seconds) continue;
      const char state = process_state(rank->pid);
      // Runnable but never run is a busy machine, not a fault of the rank.
      if (state == 'R' || (state == 'D' && still < kDiskFactor * stuck_seconds)) continue;
      const char* why = state == 'T'   ? ", stopped by a signal"
                        : state == 't' ? ", stopped by a debugger"
                        : state == 'D' ? ", waiting for a device"
                                       : "";
      const std::lock_guard lock(mutex);
      rank->error = Error(
          Code::kUnavailable,
          fmt::format("rank {} (pid {}) is stuck: no CPU time and no progress for {:.1f} s at step "
                      "{}{}",
                      rank->rank, rank->pid, still,
                      rank->page->step.load(std::memory_order_relaxed), why));
      rank->state = "stuck";
      changed.notify_all();
    }
  }

  void look_for_fault() {
    std::optional<Error> error;
    bool definite = false;
    {
      const std::lock_guard lock(mutex);
      if (cause_told || calling || stopping || quit) return;
      for (const auto& rank : ranks)
        definite = definite || killed(*rank) || rank->state == "stuck";
      if (fault_told && !definite) return;
      error = first_error();
      if (!error) return;
      fault_told = true;
      cause_told = definite;
    }
    send_abort(error->what());
    if (on_fault) on_fault(*error, definite);
  }

  void run() {
    while (true) {
      std::vector<pollfd> fds = {{wake.get(), POLLIN, 0}};
      std::vector<RankProcess*> live;
      {
        const std::lock_guard lock(mutex);
        if (quit) return;
        for (const auto& rank : ranks) {
          if (rank->ended) continue;
          live.push_back(rank.get());
          fds.push_back({rank->pidfd.get(), POLLIN, 0});
          fds.push_back({rank->socket->fd(), POLLIN, 0});
        }
      }
      if (to_start != nullptr) {
        spawn_all();
        continue;
      }
      ::poll(fds.data(), fds.size(), static_cast<int>(kLookEvery.count()));
      uint64_t count = 0;
      [[maybe_unused]] const ssize_t n = ::read(wake.get(), &count, sizeof count);
      for (size_t i = 0; i < live.size(); ++i) {
        if (fds[2 + 2 * i].revents & POLLIN) read_messages(*live[i]);
        if (fds[1 + 2 * i].revents != 0) reap(*live[i]);
      }
      look_for_stuck();
      look_for_fault();
    }
  }
};

RankSupervisor::RankSupervisor(std::string node, double stuck_seconds, OnFault on_fault)
    : state_(std::make_unique<State>(std::move(node), stuck_seconds, std::move(on_fault))) {
  state_->thread = std::thread([s = state_.get()] { s->run(); });
}

RankSupervisor::~RankSupervisor() { end(); }

void RankSupervisor::end() {
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->quit) return;
    state_->quit = true;
  }
  state_->nudge();
  state_->thread.join();
  // All first, so that they end at the same time.
  for (const auto& rank : state_->ranks)
    if (!rank->ended) ::kill(rank->pid, SIGKILL);
  for (const auto& rank : state_->ranks) {
    if (rank->ended) continue;
    ::waitpid(rank->pid, nullptr, 0);
    const std::lock_guard lock(state_->mutex);
    rank->ended = true;
    rank->state = "ended";
  }
}

void RankSupervisor::start(const std::vector<RankStart>& ranks, Deadline deadline) {
  {
    std::unique_lock lock(state_->mutex);
    state_->to_start = &ranks;
    state_->calling = true;
    state_->nudge();
    state_->changed.wait(lock, [this] { return state_->to_start == nullptr; });
    if (state_->start_error) throw *state_->start_error;
  }
  (void)call(json(), "started", deadline);
}

std::vector<json> RankSupervisor::call(const json& order, const std::string& event,
                                       Deadline deadline) {
  {
    const std::lock_guard lock(state_->mutex);
    state_->calling = true;
  }
  if (!order.is_null()) {
    for (const auto& rank : state_->ranks) {
      try {
        state_->send(*rank, order);
      } catch (const std::exception&) {
        // It has ended; the wait below tells how.
      }
    }
  }
  std::unique_lock lock(state_->mutex);
  const auto all_answered = [this] {
    for (const auto& rank : state_->ranks)
      if (rank->answers.empty()) return false;
    return true;
  };
  const auto any_error = [this] { return state_->first_error().has_value(); };
  const bool in_time = state_->changed.wait_until(
      lock, deadline.when(), [&] { return all_answered() || any_error(); });
  if (any_error()) {
    // Give a killed rank's story a moment to arrive before those of its victims.
    state_->changed.wait_for(lock, std::chrono::milliseconds(100), [] { return false; });
    const Error error = *state_->first_error();
    lock.unlock();
    state_->send_abort(error.what());
    throw error;
  }
  if (!in_time) {
    std::string missing;
    for (const auto& rank : state_->ranks)
      if (rank->answers.empty()) missing += fmt::format(" {}", rank->rank);
    lock.unlock();
    state_->send_abort("deadline");
    throw Error(Code::kDeadlineExceeded,
                fmt::format("no answer '{}' in time from rank{}", event, missing));
  }
  std::vector<json> answers;
  for (const auto& rank : state_->ranks) {
    answers.push_back(std::move(rank->answers.front()));
    rank->answers.pop_front();
  }
  state_->calling = false;
  lock.unlock();
  state_->nudge();
  return answers;
}

void RankSupervisor::abort(const std::string& reason) noexcept {
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->aborted) return;
    state_->aborted = true;
    state_->fault_told = true;
  }
  try {
    state_->send_abort(reason);
  } catch (const std::exception& e) {
    log_warn("telling the local ranks to abort: {}", e.what());
  }
}

bool RankSupervisor::wait_stopped(Deadline deadline) {
  std::unique_lock lock(state_->mutex);
  state_->stopping = true;
  const bool all = state_->changed.wait_until(lock, deadline.when(), [this] {
    for (const auto& rank : state_->ranks)
      if (!rank->ended) return false;
    return true;
  });
  bool clean = all;
  for (const auto& rank : state_->ranks) {
    if (!rank->ended) ::kill(rank->pid, SIGKILL);
    clean = clean && WIFEXITED(rank->status) && WEXITSTATUS(rank->status) == 0;
  }
  return clean;
}

std::vector<RankSupervisor::View> RankSupervisor::views() const {
  const std::lock_guard lock(state_->mutex);
  std::vector<View> views;
  for (const auto& rank : state_->ranks)
    views.push_back({rank->rank, rank->pid, rank->state, rank->page});
  return views;
}

}  // namespace phalanx::apps
