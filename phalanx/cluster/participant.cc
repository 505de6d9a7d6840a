#include <fmt/format.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "control.pb.h"
#include "phalanx/base/log.h"
#include "phalanx/cluster/control.h"
#include "phalanx/cluster/control_client.h"
#include "phalanx/cluster/host_probe.h"
#include "phalanx/cluster/join_check.h"
#include "phalanx/net/address.h"

namespace phalanx::cluster {

using control::v1::FromMaster;
using control::v1::FromNode;

namespace {

constexpr double kWelcomeSeconds = 10;   // from connecting to the master's answer
constexpr double kFarewellSeconds = 2;   // for the last words to arrive
constexpr double kVerdictSeconds = 5;    // for the master to say why the instance failed

Clock::duration seconds(double value) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(value));
}

double seconds_since(Clock::time_point when) {
  return std::chrono::duration<double>(Clock::now() - when).count();
}

}  // namespace

// One mutex guards everything; it is never held while a NodeActions method runs. Threads: the
// caller of run(), which is the control thread; gRPC's, which only record; while joined, a ticker
// (heartbeats) and a watcher (abort()).
struct Participant::State final : ControlClient::Handler {
  struct End {
    Code code;
    std::string reason;
  };
  // Ticker and watcher, for as long as the node is joined.
  class Company {
   public:
    explicit Company(State& state)
        : state_(state),
          ticker_([&state] { state.tick(); }),
          watcher_([&state] { state.watch(); }) {}
    ~Company() {
      {
        const std::lock_guard lock(state_.mutex);
        state_.quit = true;
        state_.cv.notify_all();
      }
      ticker_.join();
      watcher_.join();
    }

   private:
    State& state_;
    std::thread ticker_, watcher_;
  };

  State(const ControlOptions& given, NodeActions& actions)
      : options(given),
        local(actions),
        master(options.table.servers[static_cast<size_t>(options.table.master())].address()),
        own(options.table.servers[static_cast<size_t>(options.own_server)].address()) {}

  void run();
  // Life as a joined node. Returns, without the lock, with `ended` set if the stream ended before
  // anything was begun, and with `ended` empty after an orderly end.
  void follow(std::unique_lock<std::mutex>& lock);
  void obey(const FromMaster& message, std::unique_lock<std::mutex>& lock);
  void stand_by(const std::string& why, std::unique_lock<std::mutex>& lock);
  bool wait_welcome(std::unique_lock<std::mutex>& lock);
  void say_leave(std::unique_lock<std::mutex>& lock);
  // Says what failed here, then ends run() with the master's verdict, or `error` if none comes.
  [[noreturn]] void fail(std::unique_lock<std::mutex>& lock, const FromNode& message,
                         const Error& error);

  void on_message(const FromMaster& message) override;
  void on_end(Code code, const std::string& reason) override;
  void tick();
  void watch();
  // Ends this generation here: the watcher calls abort() once.
  void abort_locked(const std::string& reason) { abort_locked(reason, generation.number); }
  void abort_locked(const std::string& reason, uint64_t number) {
    if (number > aborted) {
      aborted = number;
      abort_reason = reason;
    }
    cv.notify_all();
  }
  // Sends with the present generation.
  void send(FromNode message, bool droppable = false) {
    message.set_incarnation(generation.incarnation);
    message.set_generation(generation.number);
    client->send(message, droppable);
  }
  // Says that something failed here: where the master recovers, the next order follows, else run()
  // ends with its verdict.
  void report(std::unique_lock<std::mutex>& lock, const FromNode& message, const Error& error);
  // Why this order may not be obeyed; empty: it may.
  std::string out_of_order(const FromMaster& message) const;
  [[nodiscard]] Error lost_error() const {
    return Error(Code::kUnavailable,
                 fmt::format("master {} is lost{}: {}", master,
                             phase.empty() ? "" : " in phase " + phase, ended->reason));
  }

  const ControlOptions options;
  NodeActions& local;
  const std::string master, own;

  std::mutex mutex;
  std::condition_variable cv;
  std::unique_ptr<ControlClient> client;  // changed by run() alone, while no Company lives
  std::deque<FromMaster> inbox;           // without heartbeats and waiting lines
  std::optional<End> ended;               // the stream; what is in the inbox came before
  std::optional<std::string> leaving;
  std::optional<Error> local_fault;         // of the present generation
  bool local_fault_definite = false;
  Generation generation;                    // prepared last; number 0: none on this stream
  uint64_t aborted = 0;                     // highest generation that was told to end
  uint64_t abort_called = 0;                // highest one that abort() was called for
  bool aborting = false;
  std::string abort_reason;
  Clock::time_point contact;
  std::string phase;        // being run
  bool in_action = false;
  bool stop_received = false;
  std::optional<Clock::time_point> claimed_since;  // by another process, as the master says
  bool prepared = false;    // ever: there are weights to keep
  bool spare = false;       // the instance serves without ranks of this node
  bool recover = false;     // as the master's welcome says
  double recovery_seconds = 0;
  bool quit = false;
};

void Participant::State::run() {
  auto begin = Clock::now();
  auto next_notice = begin;
  double limit = options.join_seconds;
  std::string last_reason;
  auto pause = std::chrono::milliseconds(100);
  std::unique_lock lock(mutex);
  while (true) {
    if (leaving) return;
    if (local_fault && !recover) throw Error(*local_fault);
    inbox.clear();
    ended.reset();
    local_fault.reset();
    generation = {};
    aborted = abort_called = 0;
    lock.unlock();
    client = std::make_unique<ControlClient>(
        master, options.port,
        ControlSecurity{options.tls, options.table, options.own_server, options.renewed_tls}, *this);
    lock.lock();
    const bool joined = wait_welcome(lock);
    if (!joined && stop_received) return;
    if (joined) {
      log_info("joined master {} after {:.1f} s", net::endpoint(master, options.port),
               seconds_since(begin));
      pause = std::chrono::milliseconds(100);
      follow(lock);
      lock.lock();
      if (!ended) return;
      begin = Clock::now();
      if (prepared || spare) {
        limit = recovery_seconds;
        log_error("{}; this node {} and waits up to {:.0f} s for it", lost_error().what(),
                  prepared ? "keeps its weights" : "is a spare", limit);
      }
    }
    const std::string reason = ended ? ended->reason : "stopped";
    lock.unlock();
    client.reset();
    lock.lock();
    if (leaving) continue;
    if ((prepared || spare) && seconds_since(begin) >= limit) {
      throw Error(Code::kUnavailable,
                  fmt::format("master {} is lost and did not return within {:.0f} s; last reason: "
                              "{}",
                              net::endpoint(master, options.port), limit, reason));
    }
    if (limit > 0 && seconds_since(begin) >= limit) {
      throw Error(Code::kDeadlineExceeded,
                  fmt::format("master {} did not take this node ({}) within {:.0f} s; last reason: "
                              "{}. Fix: start the master, and check that {} is reachable from here",
                              net::endpoint(master, options.port), own, options.join_seconds,
                              reason, master));
    }
    if (reason != last_reason || Clock::now() >= next_notice) {
      log_info("waiting for master {} for {:.0f} s: {}", net::endpoint(master, options.port),
               seconds_since(begin), reason);
      last_reason = reason;
      next_notice = Clock::now() + seconds(options.notice_seconds);
    }
    cv.wait_for(lock, pause, [&] { return leaving.has_value(); });
    pause = std::min(pause * 2, std::chrono::milliseconds(1000));
  }
}

// True when welcomed; false when the stream ended or this node leaves. Throws when refused.
bool Participant::State::wait_welcome(std::unique_lock<std::mutex>& lock) {
  FromNode message;
  auto* join = message.mutable_join();
  join->set_control_version(kControlVersion);
  join->set_server(static_cast<uint32_t>(options.own_server));
  join->set_address(own);
  for (const auto& [name, value] : all_facts(options)) {
    auto* fact = join->add_facts();
    fact->set_name(name);
    fact->set_value(value);
  }
  join->set_build(options.offer.build);
  for (const std::string& name : options.offer.numeric_classes) join->add_numeric_classes(name);
  join->set_memory_bytes(options.offer.memory_bytes);
  join->set_cores(options.offer.cores);
  join->set_bytes_per_second(options.offer.bytes_per_second);
  join->set_unix_ms(unix_ms(options));
  client->send(message);
  const bool answered = cv.wait_for(lock, seconds(kWelcomeSeconds), [&] {
    return !inbox.empty() || ended || leaving;
  });
  if (!answered) ended = End{Code::kUnavailable, "no answer to the join"};
  if (inbox.empty() && ended && ended->code == Code::kPermissionDenied)
    throw Error(ended->code, fmt::format("this node refused master {}: {}", master, ended->reason));
  if (inbox.empty()) return false;
  const FromMaster answer = inbox.front();
  inbox.pop_front();
  if (answer.has_welcome()) {
    contact = Clock::now();
    recover = answer.welcome().recover();
    recovery_seconds = answer.welcome().recovery_seconds();
    claimed_since.reset();
    return true;
  }
  if (answer.has_refused()) {
    const Code code = code_of(answer.refused().code());
    // The process that had this entry before may be gone without the master knowing it yet.
    if (code == Code::kAlreadyExists && !claimed_since) claimed_since = Clock::now();
    const bool stale_claim = code == Code::kAlreadyExists &&
                             seconds_since(*claimed_since) < 2 * options.lost_seconds;
    if (code == Code::kCancelled && (prepared || spare)) {
      log_info("master {} stopped the instance while it was out of reach: {}", master,
               printable(answer.refused().reason()));
      stop_received = true;
      return false;
    }
    if (code == Code::kUnavailable || code == Code::kCancelled || stale_claim) {
      ended = End{Code::kUnavailable, printable(answer.refused().reason())};
      return false;
    }
    throw Error(code_of(answer.refused().code()),
                fmt::format("master {} refused this node: {}", master,
                            printable(answer.refused().reason(), 100'000)));
  }
  ended = End{Code::kUnavailable, "unexpected answer to the join"};
  return false;
}

void Participant::State::follow(std::unique_lock<std::mutex>& lock) {
  quit = false;
  lock.unlock();
  const Company company(*this);
  lock.lock();
  // Company's destructor must run without the lock, whichever way this function is left.
  struct Unlock {
    std::unique_lock<std::mutex>& lock;
    ~Unlock() {
      if (lock.owns_lock()) lock.unlock();
    }
  };
  {
    const Unlock unlock{lock};
    while (true) {
      // No deadline of its own: the ticker ends the stream when the master falls silent.
      cv.wait(lock, [&] { return !inbox.empty() || ended || leaving || local_fault; });
      if (local_fault) {
        const Error error = *local_fault;
        if (recover) local_fault.reset();
        FromNode message;
        message.mutable_fault()->set_code(static_cast<int>(error.code()));
        message.mutable_fault()->set_message(error.what());
        message.mutable_fault()->set_definite(local_fault_definite);
        report(lock, message, error);
        continue;
      }
      if (leaving) {
        say_leave(lock);
        break;
      }
      if (inbox.empty()) {
        if ((prepared || spare) && !recover) throw lost_error();
        break;
      }
      const FromMaster message = inbox.front();
      inbox.pop_front();
      if (stop_received && !message.has_stop()) continue;
      if (message.has_stop()) {
        log_info("master {} stops the instance: {}", master, printable(message.stop().reason()));
        FromNode goodbye;
        goodbye.mutable_goodbye();
        send(goodbye);
        lock.unlock();
        client->finish(Deadline::in_seconds(kFarewellSeconds));
        lock.lock();
        ended.reset();  // an orderly end
        break;
      }
      if (message.has_fail()) {
        throw Error(code_of(message.fail().code()), printable(message.fail().message(), 100'000));
      }
      if (message.has_standby()) {
        stand_by(message.standby().reason(), lock);
        continue;
      }
      obey(message, lock);
    }
  }
}

void Participant::State::stand_by(const std::string& why, std::unique_lock<std::mutex>& lock) {
  if (!std::exchange(spare, true))
    log_info(
        "this node is a spare of master {}{}: it has no ranks and takes over those of a node "
        "that stays away",
        master, why.empty() ? "" : ": " + printable(why, 400));
  cv.wait(lock, [&] { return !aborting && (abort_called == aborted || quit); });
  lock.unlock();
  local.stand_by();
  lock.lock();
}

std::string Participant::State::out_of_order(const FromMaster& message) const {
  const auto name = [](uint64_t incarnation, uint64_t number) {
    return fmt::format("generation {} (incarnation {:016x})", number, incarnation);
  };
  const std::string theirs = name(message.incarnation(), message.generation());
  const std::string ours = name(generation.incarnation, generation.number);
  if (!message.has_prepare()) {
    if (message.incarnation() == generation.incarnation &&
        message.generation() == generation.number && generation.number > 0)
      return {};
    return fmt::format("an order for {} came, the one prepared is {}", theirs, ours);
  }
  if (generation.number == 0) return {};
  if (message.incarnation() != generation.incarnation)
    return fmt::format("{} came on a connection that has {}", theirs, ours);
  if (message.generation() <= generation.number)
    return fmt::format("{} was to be prepared again, after {}", theirs, ours);
  return {};
}

void Participant::State::obey(const FromMaster& message, std::unique_lock<std::mutex>& lock) {
  static const std::map<FromMaster::KindCase, const char*> names{
      {FromMaster::kPrepare, "prepare"},   {FromMaster::kConnect, "connect"},
      {FromMaster::kLoad, "load"},         {FromMaster::kAllocate, "allocate"},
      {FromMaster::kServe, "serve"}};
  const auto name = names.find(message.kind_case());
  if (name == names.end()) return;
  if (const std::string wrong = out_of_order(message); !wrong.empty()) {
    log_warn("refused the order '{}' of master {}: {}", name->second, master, wrong);
    return;
  }
  if (message.has_prepare()) {
    cv.wait(lock, [&] { return !aborting && (abort_called == aborted || quit); });
    generation = {.incarnation = message.incarnation(),
                  .number = message.generation(),
                  .numeric_class = printable(message.prepare().numeric_class(), 100)};
    for (const auto& seat : message.prepare().seats())
      generation.seats.push_back({.server = seat.server(), .weight = seat.weight()});
    local_fault.reset();
    prepared = true;
    spare = false;
  }
  if (aborted >= generation.number) return;  // over already; the master knows
  phase = name->second;
  in_action = true;
  lock.unlock();
  FromNode answer;
  std::optional<Error> error;
  try {
    switch (message.kind_case()) {
      case FromMaster::kPrepare: {
        Generation present = generation;
        const std::string& token = message.prepare().token();
        if (token.size() != present.token.size())
          throw Error(Code::kInternal, "the master sent a token of the wrong size");
        std::memcpy(present.token.data(), token.data(), token.size());
        std::string wrong = seating_problem(present.seats, options.table);
        if (wrong.empty() && !is_seated(present.seats, options.own_server))
          wrong = "it has no rank for this node";
        if (!wrong.empty())
          throw Error(Code::kFailedPrecondition,
                      fmt::format("the cut of the model that master {} decided cannot be "
                                  "followed: {}", master, wrong));
        answer.mutable_prepared()->set_seats(digest(present.seats));
        for (const RankEndpoint& e : local.prepare(present)) {
          auto* endpoint = answer.mutable_prepared()->add_endpoints();
          endpoint->set_rank(e.rank);
          endpoint->set_address(e.address);
          endpoint->set_port(e.port);
        }
        break;
      }
      case FromMaster::kConnect: {
        std::vector<comm::Member> members;
        for (const auto& m : message.connect().members()) {
          members.push_back({.rank = m.rank(),
                             .node = m.node(),
                             .host = printable(m.host(), 100),
                             .data_address = printable(m.data_address(), 100),
                             .data_port = static_cast<uint16_t>(m.data_port())});
        }
        local.connect(members);
        answer.mutable_connected();
        break;
      }
      case FromMaster::kLoad: {
        const LoadResult result = local.load();
        answer.mutable_loaded()->set_kv_blocks(result.kv_blocks);
        answer.mutable_loaded()->set_bytes_read(result.bytes_read);
        break;
      }
      case FromMaster::kAllocate:
        local.allocate(message.allocate().kv_blocks());
        answer.mutable_allocated();
        break;
      default:
        local.serve();
        answer.mutable_serving();
    }
  } catch (const Error& e) {
    error = e;
  } catch (const std::exception& e) {
    error = Error(Code::kInternal, e.what());
  }
  lock.lock();
  in_action = false;
  if (error) {
    // When it threw because it was told to stop, the loop finds the order in the inbox.
    if (leaving || stop_received) return;
    answer = {};
    answer.mutable_phase_failed()->set_code(static_cast<int>(error->code()));
    answer.mutable_phase_failed()->set_message(error->what());
    report(lock, answer,
           Error(error->code(),
                 fmt::format("node {} failed in phase {}: {}", own, phase, error->what())));
  } else {
    send(answer);
  }
  phase.clear();
}

void Participant::State::report(std::unique_lock<std::mutex>& lock, const FromNode& message,
                                const Error& error) {
  if (!recover) fail(lock, message, error);
  log_warn("{}", error.what());
  send(message);
}

void Participant::State::fail(std::unique_lock<std::mutex>& lock, const FromNode& message,
                              const Error& error) {
  send(message);
  const Deadline deadline = Deadline::in_seconds(kVerdictSeconds);
  while (cv.wait_until(lock, deadline.when(), [&] { return !inbox.empty() || ended; })) {
    if (inbox.empty()) {
      // A rank that lost its peers, and the master gone: the latter is the cause.
      if (!local_fault && may_be_symptom(error.code())) throw lost_error();
      break;
    }
    const FromMaster answer = inbox.front();
    inbox.pop_front();
    if (answer.has_fail())
      throw Error(code_of(answer.fail().code()), printable(answer.fail().message(), 100'000));
  }
  throw Error(error);
}

void Participant::State::say_leave(std::unique_lock<std::mutex>& lock) {
  FromNode message;
  message.mutable_leave()->set_reason(*leaving);
  send(message);
  lock.unlock();
  client->finish(Deadline::in_seconds(kFarewellSeconds));
  lock.lock();
  ended.reset();
}

void Participant::State::on_message(const FromMaster& message) {
  std::string line;
  {
    const std::lock_guard lock(mutex);
    contact = Clock::now();
    if (message.has_heartbeat()) return;
    if (message.has_waiting()) {
      line = printable(message.waiting().line());
    } else {
      if (message.has_abort())
        abort_locked(printable(message.abort().reason()), message.generation());
      if (message.has_fail()) abort_locked(printable(message.fail().message()));
      if (message.has_stop()) {
        stop_received = true;
        if (in_action)
          abort_locked("the instance is being stopped: " + printable(message.stop().reason()));
      }
      inbox.push_back(message);
      cv.notify_all();
    }
  }
  if (!line.empty()) log_info("joined; {}", line);
}

void Participant::State::on_end(Code code, const std::string& reason) {
  const std::lock_guard lock(mutex);
  if (!ended) ended = End{code, reason};
  if (!stop_received && !leaving) abort_locked(lost_error().what());
  cv.notify_all();
}

void Participant::State::tick() {
  std::unique_lock lock(mutex);
  auto last = Clock::now();
  while (!quit) {
    lock.unlock();
    FromNode message;
    message.mutable_heartbeat();
    try {
      for (const RankReport& report : local.reports()) {
        auto* r = message.mutable_heartbeat()->add_ranks();
        r->set_rank(report.rank);
        r->set_pid(report.pid);
        r->set_state(report.state);
        for (const auto& [name, value] : report.counters) (*r->mutable_counters())[name] = value;
      }
    } catch (const std::exception& e) {
      log_warn("no report of the ranks: {}", e.what());
    }
    lock.lock();
    send(message, true);
    auto wake = last + seconds(options.heartbeat_seconds);
    if (!ended) wake = std::min(wake, contact + seconds(options.lost_seconds));
    cv.wait_until(lock, wake, [&] { return quit; });
    const auto now = Clock::now();
    // If this process itself was held up, silence of the master proves nothing.
    const auto stall =
        std::max(now - last - seconds(1.5 * options.heartbeat_seconds), Clock::duration(0));
    last = now;
    contact = std::min(contact + stall, now);
    if (!ended && !quit && now - contact >= seconds(options.lost_seconds)) {
      lock.unlock();
      const bool answers = host_answers(master);
      lock.lock();
      if (ended || quit || contact > now) continue;
      ended = End{Code::kUnavailable,
                  fmt::format("no sign of life for {:.1f} s; its host {}", seconds_since(contact),
                              answers ? "answers, so its node process stands still"
                                      : "does not answer either")};
      abort_locked(lost_error().what());
    }
  }
}

void Participant::State::watch() {
  std::unique_lock lock(mutex);
  for (;;) {
    cv.wait(lock, [&] { return aborted > abort_called || quit; });
    if (aborted == abort_called) return;
    // A generation that ended before its turn has nothing to abort.
    const bool present = generation.number > abort_called && generation.number <= aborted;
    abort_called = aborted;
    if (!present) continue;
    const std::string reason = abort_reason;
    aborting = true;
    lock.unlock();
    local.abort(reason);
    lock.lock();
    aborting = false;
    cv.notify_all();
  }
}

Participant::Participant(const ControlOptions& options, NodeActions& local)
    : state_(std::make_unique<State>(options, local)) {}

Participant::~Participant() = default;

void Participant::run() {
  struct Close {
    State& state;
    ~Close() { state.client.reset(); }  // the stream ends with run()
  };
  const Close close{*state_};
  state_->run();
}

void Participant::leave(const std::string& reason) {
  const std::lock_guard lock(state_->mutex);
  if (!state_->leaving) state_->leaving = reason;
  if (state_->in_action) state_->abort_locked("this node leaves: " + reason);
  state_->cv.notify_all();
}

void Participant::report_local_fault(uint64_t generation, const Error& error, bool definite) {
  const std::lock_guard lock(state_->mutex);
  if (generation != state_->generation.number) return;
  if (!state_->local_fault) {
    state_->local_fault = error;
    state_->local_fault_definite = definite;
  }
  state_->abort_locked(error.what());
}

}  // namespace phalanx::cluster
