#include <fmt/format.h>

#include <algorithm>

#include "control.pb.h"
#include "phalanx/base/log.h"
#include "phalanx/cluster/coordinator_state.h"
#include "phalanx/cluster/join_check.h"

namespace phalanx::cluster {

using control::v1::FromMaster;

namespace {

constexpr double kForEver = 1e8;
constexpr auto kFirstPause = std::chrono::milliseconds(50);  // between attempts
constexpr auto kLongestPause = std::chrono::milliseconds(2000);

FromMaster failure_message(Code code, const std::string& text) {
  FromMaster message;
  message.mutable_fail()->set_code(static_cast<int>(code));
  message.mutable_fail()->set_message(text);
  return message;
}

}  // namespace

void Coordinator::State::start() {
  std::unique_lock lock(mutex);
  const bool first = generation.number == 0;
  give_up = Deadline::in_seconds(!first                     ? options.recovery_seconds
                                 : options.join_seconds > 0 ? options.join_seconds
                                                            : kForEver)
                .when();
  auto pause = Clock::duration(kFirstPause);
  for (;;) {
    begin_generation(lock);
    try {
      form(lock);
      return;
    } catch (const Lost& lost) {
      log_warn("generation {} was lost before it served: {}; trying again", generation.number,
               lost.text);
    }
    // From a first loss on, the nodes are waited for as after any other.
    if (first) give_up = std::min(give_up, Deadline::in_seconds(options.recovery_seconds).when());
    cv.wait_for(lock, pause, [&] { return stage == Stage::kEnding; });
    pause = std::min<Clock::duration>(2 * pause, kLongestPause);
  }
}

void Coordinator::State::begin_generation(std::unique_lock<std::mutex>& lock) {
  cv.wait(lock, [&] { return !aborting && (!abort_reason || abort_called || quit); });
  if (stage == Stage::kEnding || stage == Stage::kClosed) throw_if_over(lock);
  failure.reset();
  abort_reason.reset();
  abort_called = false;
  phase.clear();
  phase_deadline.reset();
  stage = Stage::kJoining;
  for (size_t i = 0; i < nodes.size(); ++i) {
    const int server = static_cast<int>(i);
    nodes[i].state = !here(server)  ? NodeState::kAbsent
                     : seated(server) ? NodeState::kJoined
                                      : NodeState::kSpare;
  }
}

void Coordinator::State::form(std::unique_lock<std::mutex>& lock) {
  wait_for_all(lock);
  std::vector<std::string> names;
  std::vector<NodeOffer> offers;
  const auto add = [&](const Node& node) {
    names.push_back(node.name);
    offers.push_back(node.offer);
  };
  const Node& master = nodes[static_cast<size_t>(options.own_server)];
  add(master);
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (&nodes[i] != &master && seated(static_cast<int>(i))) add(nodes[i]);
  }
  if (generation.number == 0) {  // later nodes must offer the class of the first generation
    try {
      generation.numeric_class =
          options.mixed_classes ? kMixedClasses : common_numeric_class(names, offers);
    } catch (const Error& e) {
      fault(options.own_server, e.code(), e.what(), false);
      throw_if_over(lock);
    }
    refuse_other_classes();
    decide_seats(lock);
  }
  tell_classes(names, offers);
  ++generation.number;
  generation.token = comm::random_token();
  stage = Stage::kPhases;

  FromMaster prepare;
  prepare.mutable_prepare()->set_numeric_class(generation.numeric_class);
  prepare.mutable_prepare()->set_token(generation.token.data(), generation.token.size());
  for (const Seat& seat : generation.seats) {
    auto* s = prepare.mutable_prepare()->add_seats();
    s->set_server(seat.server);
    s->set_weight(seat.weight);
  }
  std::vector<RankEndpoint> endpoints;
  run_phase(lock, {.name = "prepare", .state = NodeState::kPreparing}, prepare,
            [&, present = generation] { endpoints = local.prepare(present); });
  nodes[static_cast<size_t>(options.own_server)].endpoints = endpoints;

  std::vector<comm::Member> all;
  try {
    all = members();
  } catch (const Error& e) {
    fault(options.own_server, e.code(), e.what(), false);
    throw_if_over(lock);
  }
  FromMaster connect;
  connect.mutable_connect();
  for (const comm::Member& member : all) {
    auto* m = connect.mutable_connect()->add_members();
    m->set_rank(member.rank);
    m->set_node(member.node);
    m->set_host(member.host);
    m->set_data_address(member.data_address);
    m->set_data_port(member.data_port);
  }
  run_phase(lock, {.name = "connect", .state = NodeState::kConnecting}, connect,
            [&] { local.connect(all); });

  FromMaster load;
  load.mutable_load();
  LoadResult own_load;
  run_phase(lock, {.name = "load", .state = NodeState::kLoading}, load,
            [&] { own_load = local.load(); });
  nodes[static_cast<size_t>(options.own_server)].load = own_load;

  int smallest = options.own_server;
  for (const Seat& seat : generation.seats) {
    if (nodes[static_cast<size_t>(seat.server)].load.kv_blocks <
        nodes[static_cast<size_t>(smallest)].load.kv_blocks)
      smallest = seat.server;
  }
  const int64_t blocks = nodes[static_cast<size_t>(smallest)].load.kv_blocks;
  if (blocks < 1) {
    fault(smallest, Code::kResourceExhausted,
          fmt::format("{} has memory for {} KV blocks, expected at least 1",
                      nodes[static_cast<size_t>(smallest)].name, blocks),
          false);
    throw_if_over(lock);
  }
  FromMaster allocate;
  allocate.mutable_allocate()->set_kv_blocks(blocks);
  run_phase(lock, {.name = "allocate", .state = NodeState::kAllocating}, allocate,
            [&] { local.allocate(blocks); });
  for (const Seat& seat : generation.seats)
    nodes[static_cast<size_t>(seat.server)].state = NodeState::kReady;

  FromMaster serve;
  serve.mutable_serve();
  run_phase(lock, {.name = "serve", .state = NodeState::kServing, .local_first = true}, serve,
            [&] { local.serve(); });
  stage = Stage::kServing;
  proven_seats = generation.seats;
  attempts = 0;
  if (generation.seats.size() == full_seats.size()) {
    full_seats = generation.seats;
    growths_failed = 0;
  }
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (nodes[i].stream != 0 && !seated(static_cast<int>(i))) send_standby(static_cast<int>(i));
  }
}

void Coordinator::State::tell_classes(const std::vector<std::string>& names,
                                      const std::vector<NodeOffer>& offers) {
  const BestClasses best = best_classes(names, offers);
  if (best.text == told_classes) return;
  told_classes = best.text;
  if (best.equal) return;
  if (options.mixed_classes) {
    log_warn(
        "numeric classes are mixed, as --isa mixed allows: {}. Tokens may differ from those of "
        "any one class, and after another node took over ranks",
        best.text);
  } else {
    log_warn(
        "nodes differ in their best numeric class: {}. All compute in {}; --isa mixed lets each "
        "use its own, and gives up equal tokens",
        best.text, generation.numeric_class);
  }
}

void Coordinator::State::wait_for_all(std::unique_lock<std::mutex>& lock) {
  waiting = true;
  const auto begin = Clock::now();
  next_notice = Deadline::in_seconds(std::min(1.0, options.notice_seconds)).when();
  const auto all_here = [&] {
    return std::all_of(generation.seats.begin(), generation.seats.end(),
                       [&](const Seat& seat) { return here(seat.server); });
  };
  bool in_time = false;
  if (auto full = full_again()) {
    generation.seats = std::move(*full);
    for (size_t i = 0; i < nodes.size(); ++i)
      if (here(static_cast<int>(i)) && seated(static_cast<int>(i)))
        nodes[i].state = NodeState::kJoined;
  }
  for (;;) {
    in_time = cv.wait_until(lock, std::min(give_up, next_take_over()), [&] {
      return all_here() || stage != Stage::kJoining || failure || take_over_due();
    });
    if (take_over_due() && !all_here() && stage == Stage::kJoining && !failure) {
      take_over();
    } else if (in_time) {
      break;
    } else if (Clock::now() >= give_up) {
      if (!options.shrink || generation.number == 0 || !shrink()) break;
      give_up = Deadline::in_seconds(options.recovery_seconds).when();
    }
  }
  waiting = false;
  if (!in_time) {
    const std::chrono::duration<double> waited = Clock::now() - begin;
    fault(options.own_server, Code::kDeadlineExceeded,
          fmt::format("not all nodes {} within {:.0f} s: {}",
                      generation.number == 0 ? "joined" : "returned", waited.count(), notice()),
          false);
    failure->recoverable = false;
  }
  throw_if_over(lock);
}

void Coordinator::State::run_phase(std::unique_lock<std::mutex>& lock, const Phase& what,
                                   FromMaster message, const std::function<void()>& action) {
  throw_if_over(lock);
  phase = what.name;
  phase_since = Clock::now();
  phase_deadline = Deadline::in_seconds(options.phase_seconds).when();
  next_notice = Deadline::in_seconds(options.notice_seconds).when();
  for (size_t i = 0; i < nodes.size(); ++i) {
    nodes[i].done = !seated(static_cast<int>(i));
    if (!nodes[i].done && !what.local_first) nodes[i].state = what.state;
  }
  if (!what.local_first) send_seated(message);
  lock.unlock();
  std::optional<Error> error;
  try {
    action();
  } catch (const Error& e) {
    error = e;
  } catch (const std::exception& e) {
    error = Error(Code::kInternal, e.what());
  }
  lock.lock();
  if (error) {
    fault(options.own_server, error->code(),
          fmt::format("{} failed in phase {}: {}", name_of(options.own_server), phase,
                      error->what()),
          true);
  } else {
    phase_done(options.own_server, phase);
    if (what.local_first && !failure && stage == Stage::kPhases) {
      nodes[static_cast<size_t>(options.own_server)].state = what.state;
      send_seated(message);
    }
  }
  cv.wait(lock, [&] {  // ends by the phase deadline, which the ticker keeps
    return failure || stage != Stage::kPhases ||
           std::all_of(nodes.begin(), nodes.end(), [](const Node& node) { return node.done; });
  });
  phase_deadline.reset();
  throw_if_over(lock);
  phase.clear();
  if (what.local_first) {
    for (const Seat& seat : generation.seats)
      nodes[static_cast<size_t>(seat.server)].state = what.state;
  }
}

void Coordinator::State::throw_if_over(std::unique_lock<std::mutex>& lock) {
  if (failure && stage != Stage::kEnding && stage != Stage::kClosed) {
    const Clock::time_point settles = failure->settles;
    cv.wait_until(lock, settles, [&] { return stage == Stage::kEnding; });
    const Code code = failure->code;
    const std::string text = failure->full_text();
    if (stage != Stage::kEnding && options.recover && try_again()) throw Lost{text};
    end(lock, failure_message(code, text), Deadline::in_seconds(2));
    throw Error(code, text);
  }
  if (stage == Stage::kEnding || stage == Stage::kClosed) {
    throw Error(Code::kCancelled,
                fmt::format("the start was stopped{}{}: {}", phase.empty() ? "" : " in phase ",
                            phase, stop_reason));
  }
}

std::string Coordinator::State::Failure::full_text() const {
  std::string result = text;
  for (const std::string& other : also) result += "; also reported: " + other;
  return result;
}

std::vector<comm::Member> Coordinator::State::members() const {
  std::vector<comm::Member> all(generation.seats.size());
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (!seated(static_cast<int>(i))) continue;
    const Node& node = nodes[i];
    const std::vector<int> ranks = ranks_of(generation.seats, static_cast<int>(i));
    std::vector<bool> seen(all.size());
    for (const RankEndpoint& endpoint : node.endpoints) {
      const bool own = std::find(ranks.begin(), ranks.end(), endpoint.rank) != ranks.end();
      if (!own || seen[static_cast<size_t>(endpoint.rank)])
        throw Error(Code::kInternal, fmt::format("{} gave an endpoint for rank {}, which is not "
                                                 "one of its ranks or was given twice",
                                                 node.name, endpoint.rank));
      seen[static_cast<size_t>(endpoint.rank)] = true;
      all[static_cast<size_t>(endpoint.rank)] = {.rank = endpoint.rank,
                                                 .node = static_cast<int>(i),
                                                 .host = node.name,
                                                 .data_address = endpoint.address,
                                                 .data_port = endpoint.port};
    }
    if (node.endpoints.size() != ranks.size())
      throw Error(Code::kInternal, fmt::format("{} gave {} endpoints for its {} ranks", node.name,
                                               node.endpoints.size(), ranks.size()));
  }
  return all;
}

void Coordinator::State::end(std::unique_lock<std::mutex>& lock, const FromMaster& message,
                             Deadline deadline) {
  if (stage == Stage::kClosed) return;
  if (stage == Stage::kPhases && !failure && !abort_reason)
    abort_reason = "the start is being stopped: " + stop_reason;
  stage = Stage::kEnding;
  send_all(message);
  for (Node& node : nodes) {
    if (node.stream != 0) node.state = NodeState::kDraining;
  }
  cv.notify_all();
  cv.wait_until(lock, deadline.when(), [&] {
    return std::all_of(nodes.begin(), nodes.end(),
                       [](const Node& node) { return node.stream == 0; });
  });
  bool any_untold = false;
  const double patience = 2 * options.lost_seconds;
  for (Node& node : nodes) {
    const double silence = seconds_since(node.contact);
    const bool lost_alive = (node.verdict == "cut off" || node.verdict == "stuck") &&
                            silence < options.recovery_seconds;
    const bool silent = node.stream != 0 && silence >= 2 * options.heartbeat_seconds;
    node.untold = message.has_stop() && (lost_alive || silent);
    if (node.untold) {
      any_untold = true;
      log_warn("node {} was last heard of {:.1f} s ago: waiting up to {:.0f} s for it, to tell it of "
               "the stop", node.name, silence, patience);
    } else if (node.stream != 0) {
      log_warn("node {} did not say goodbye in time", node.name);
      server->cancel(node.stream);
    }
  }
  if (!any_untold) return;
  const auto told = [&] {  // and has the answer
    return pending.empty() && std::none_of(nodes.begin(), nodes.end(),
                                           [](const Node& node) { return node.untold; });
  };
  if (cv.wait_for(lock, std::chrono::duration<double>(patience), told)) return;
  for (const Node& node : nodes) {
    if (node.untold)
      log_warn("node {} did not come back: it was not told of the stop, and waits for a master",
               node.name);
  }
}

Coordinator::Coordinator(const ControlOptions& options, NodeActions& local)
    : state_(std::make_unique<State>(options, local)) {}

Coordinator::~Coordinator() = default;

void Coordinator::start() { state_->start(); }

void Coordinator::on_loss(std::function<void(const std::string&, const Error&)> callback) {
  const std::lock_guard lock(state_->mutex);
  state_->callback = std::move(callback);
  state_->cv.notify_all();
}

void Coordinator::report_local_fault(uint64_t generation, const Error& error, bool definite) {
  const std::lock_guard lock(state_->mutex);
  if (generation != state_->generation.number || state_->stage == State::Stage::kJoining) return;
  state_->fault(state_->options.own_server, error.code(),
                named(state_->name_of(state_->options.own_server), error.what()), !definite);
}

void Coordinator::stop(const std::string& reason, Deadline deadline) {
  std::unique_lock lock(state_->mutex);
  state_->stop_reason = reason;
  FromMaster message;
  message.mutable_stop()->set_reason(reason);
  state_->end(lock, message, deadline);
}

void Coordinator::fail(const Error& error, Deadline deadline) {
  std::unique_lock lock(state_->mutex);
  state_->stop_reason = error.what();
  state_->end(lock, failure_message(error.code(), error.what()), deadline);
}

std::vector<NodeView> Coordinator::nodes() const {
  std::vector<RankReport> own = state_->local.reports();
  const std::lock_guard lock(state_->mutex);
  const auto now = Clock::now();
  std::vector<NodeView> views;
  for (size_t i = 0; i < state_->nodes.size(); ++i) {
    const State::Node& node = state_->nodes[i];
    const bool is_own = static_cast<int>(i) == state_->options.own_server;
    const bool ever = node.contact != Clock::time_point();
    views.push_back(
        {.server = static_cast<int>(i),
         .address = node.name,
         .state = node.state,
         .last_contact_seconds =
             is_own ? 0 : ever ? std::chrono::duration<double>(now - node.contact).count() : -1,
         .verdict = node.verdict,
         .last_reason = node.reason,
         .offer = node.offer,
         .ranks = is_own ? std::move(own) : node.ranks,
         .spare = !state_->seated(static_cast<int>(i))});
  }
  return views;
}

Seating Coordinator::seats() const {
  const std::lock_guard lock(state_->mutex);
  return state_->generation.seats;
}

std::string_view node_state_name(NodeState state) {
  switch (state) {
    case NodeState::kAbsent: return "absent";
    case NodeState::kJoined: return "joined";
    case NodeState::kPreparing: return "preparing";
    case NodeState::kConnecting: return "connecting";
    case NodeState::kLoading: return "loading";
    case NodeState::kAllocating: return "allocating";
    case NodeState::kReady: return "ready";
    case NodeState::kServing: return "serving";
    case NodeState::kDraining: return "draining";
    case NodeState::kStopped: return "stopped";
    case NodeState::kLost: return "lost";
    case NodeState::kSpare: return "spare";
  }
  return "unknown";
}

}  // namespace phalanx::cluster
