#include <fmt/format.h>

#include <algorithm>
#include <random>

#include "control.pb.h"
#include "phalanx/base/log.h"
#include "phalanx/cluster/coordinator_state.h"
#include "phalanx/cluster/host_probe.h"
#include "phalanx/cluster/join_check.h"
#include "phalanx/net/address.h"

namespace phalanx::cluster {

using control::v1::FromMaster;
using control::v1::FromNode;

namespace {

constexpr auto kJoinTimeout = std::chrono::seconds(10);  // from the stream's start to its Join
constexpr auto kSettle = std::chrono::milliseconds(300);

Clock::duration seconds(double value) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(value));
}

FromMaster refused(Code code, const std::string& reason) {
  FromMaster message;
  message.mutable_refused()->set_code(static_cast<int>(code));
  message.mutable_refused()->set_reason(reason);
  return message;
}

}  // namespace

Coordinator::State::State(const ControlOptions& given, NodeActions& actions)
    : options(given), facts(all_facts(given)), local(actions) {
  const std::unique_lock lock(mutex);  // streams may come before `server` is set
  std::random_device random;
  generation.incarnation = (static_cast<uint64_t>(random()) << 32) | random();
  for (const Server& entry : options.table.servers) {
    Node node;
    node.name = entry.address();
    node.since = Clock::now();
    nodes.push_back(node);
  }
  generation.seats = proven_seats = full_seats = table_seating(options.table);
  Node& own = nodes[static_cast<size_t>(options.own_server)];
  own.state = NodeState::kJoined;
  own.offer = options.offer;
  if (nodes.size() > 1) {
    server_owner = std::make_unique<ControlServer>(
        ControlServer::Options{.address = own.name, .port = options.port,
                               .max_streams = 2 * nodes.size() + 8,
                               .security = {options.tls, options.table, options.own_server,
                                            options.renewed_tls}},
        *this);
    server = server_owner.get();
    log_info("control plane listens on {}", net::endpoint(own.name, options.port));
  }
  ticker = std::thread([this] { tick(); });
  watcher = std::thread([this] { watch(); });
}

Coordinator::State::~State() {
  {
    const std::lock_guard lock(mutex);
    stage = Stage::kClosed;
    quit = true;
    cv.notify_all();
  }
  ticker.join();
  watcher.join();
  server_owner.reset();
}

double seconds_since(Clock::time_point when) {
  return std::chrono::duration<double>(Clock::now() - when).count();
}

std::string named(const std::string& node, const std::string& text) {
  return text.starts_with(node) ? text : node + ": " + text;
}

std::string Coordinator::State::name_of(int index) const {
  return "node " + nodes[static_cast<size_t>(index)].name;
}

int Coordinator::State::server_of(StreamId stream) const {
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (nodes[i].stream == stream) return static_cast<int>(i);
  }
  return -1;
}

void Coordinator::State::send_all(FromMaster message, bool droppable) {
  message.set_incarnation(generation.incarnation);
  message.set_generation(generation.number);
  for (const Node& node : nodes) {
    if (node.stream != 0) server->send(node.stream, message, droppable);
  }
}

void Coordinator::State::send_seated(FromMaster message) {
  message.set_incarnation(generation.incarnation);
  message.set_generation(generation.number);
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (nodes[i].stream != 0 && seated(static_cast<int>(i)))
      server->send(nodes[i].stream, message);
  }
}

void Coordinator::State::on_open(StreamId stream, const std::string& peer) {
  const std::lock_guard lock(mutex);
  if (stage == Stage::kClosed) return;
  pending[stream] = {.peer = peer, .since = Clock::now()};
}

void Coordinator::State::on_message(StreamId stream, const FromNode& message) {
  std::string line;
  {
    const std::lock_guard lock(mutex);
    if (stage == Stage::kClosed) return;
    const int index = server_of(stream);
    line = index < 0 ? join(stream, message) : handle(index, message);
  }
  if (!line.empty()) log_info("{}", line);
}

void Coordinator::State::on_end(StreamId stream) {
  std::string line;
  {
    const std::lock_guard lock(mutex);
    if (stage == Stage::kClosed) return;
    pending.erase(stream);
    const int index = server_of(stream);
    if (index >= 0) line = lose(index, "dead", "its connection ended");
    cv.notify_all();
  }
  if (!line.empty()) log_warn("{}", line);
}

std::string Coordinator::State::join(StreamId stream, const FromNode& message) {
  const auto it = pending.find(stream);
  if (it == pending.end() || it->second.refused) return {};
  Code code = Code::kFailedPrecondition;
  std::string reason = refusal(message, code);
  const auto& join = message.join();
  if (!reason.empty()) {
    it->second.refused = true;
    server->send(stream, refused(code, reason));
    server->finish(stream);
    const uint32_t index = join.server();
    if (message.has_join() && index < nodes.size() && nodes[index].stream == 0)
      nodes[index].reason = "refused: " + reason;
    return fmt::format("refused {}: {}", it->second.peer, reason);
  }
  pending.erase(it);
  Node& node = nodes[join.server()];
  const bool spare = !seated(static_cast<int>(join.server()));
  node.stream = stream;
  node.state = spare ? NodeState::kSpare : NodeState::kJoined;
  node.since = node.contact = Clock::now();
  node.verdict.clear();
  node.reason.clear();
  node.unfit.clear();
  node.ranks.clear();
  node.offer = {.build = printable(join.build(), 200),
                .numeric_classes = {join.numeric_classes().begin(), join.numeric_classes().end()},
                .memory_bytes = join.memory_bytes(),
                .cores = join.cores(),
                .bytes_per_second = join.bytes_per_second()};
  for (std::string& name : node.offer.numeric_classes) name = printable(name, 100);
  FromMaster welcome;
  welcome.mutable_welcome()->set_build(options.offer.build);
  welcome.mutable_welcome()->set_recover(options.recover);
  welcome.mutable_welcome()->set_recovery_seconds(options.recovery_seconds);
  server->send(stream, welcome);
  if (spare && stage == Stage::kServing) send_standby(static_cast<int>(join.server()));
  cv.notify_all();
  const std::string why = spare ? why_without_ranks(static_cast<int>(join.server())) : "";
  return fmt::format("node {} joined{} ({} cores, {:.1f} GiB){}{}", node.name,
                     !spare            ? ""
                     : options.recover ? " as a spare"
                                       : " as a spare, which nothing uses with --on-loss=fail",
                     node.offer.cores, static_cast<double>(node.offer.memory_bytes) / (1LL << 30),
                     why.empty() ? "" : ": ", why);
}

std::string Coordinator::State::refusal(const FromNode& message, Code& code) {
  if (!message.has_join()) return "the first message was not a join";
  const auto& join = message.join();
  const std::string& own = nodes[static_cast<size_t>(options.own_server)].name;
  const std::string name = "node " + printable(join.address(), 100);
  JoinFacts theirs;
  for (const auto& fact : join.facts())
    theirs.emplace_back(printable(fact.name(), 200), printable(fact.value(), 400));
  JoinFacts ours = facts;
  add_clocks(options, unix_ms(options), join.unix_ms(), ours, theirs);
  const std::string table =
      mismatch_table(ours, theirs, "master " + own, name);
  if (!table.empty()) {
    return fmt::format("{} does not fit the master {}; these differ:\n{}\nFix: give all nodes the "
                       "same program, rank table, configuration and model",
                       name, own, table);
  }
  const bool known = join.server() < nodes.size() &&
                     static_cast<int>(join.server()) != options.own_server &&
                     net::same_address(nodes[join.server()].name, join.address());
  if (!known) {
    code = Code::kNotFound;
    return fmt::format("{} (server_list[{}]) is no slave of the rank table of master {}", name,
                       join.server(), own);
  }
  Node& node = nodes[join.server()];
  if (stage == Stage::kEnding && node.untold) {
    node.untold = false;
    code = Code::kCancelled;  // a node that belonged to it stops too
    return stop_reason;
  }
  if (node.stream != 0) {
    code = Code::kAlreadyExists;
    return fmt::format("{} has already joined and is alive (last contact {:.1f} s ago): two "
                       "processes claim the same entry, server_list[{}]. Fix: stop one of them, or "
                       "give it its own MIES_CONTAINER_IP",
                       name, seconds_since(node.contact), join.server());
  }
  if (stage == Stage::kEnding) {
    code = Code::kUnavailable;  // the node tries again: the master may be restarting
    return fmt::format("the instance of master {} is stopping", own);
  }
  if (generation.number > 0 && !options.mixed_classes &&
      std::find(join.numeric_classes().begin(), join.numeric_classes().end(),
                generation.numeric_class) == join.numeric_classes().end() &&
      !generation.numeric_class.empty()) {
    return fmt::format(
        "{} does not offer the numeric class {} that this instance computes in: its "
        "tokens would differ. It offers {}. Fix: run it on a machine that has it, "
        "without PHALANX_CPU_ISA, or start all nodes with --isa mixed, which gives up "
        "equal tokens",
        name, generation.numeric_class,
        join.numeric_classes().empty()
            ? "none"
            : printable(fmt::format("{}", fmt::join(join.numeric_classes(), ", ")), 200));
  }
  // Its entry is vacant, so the instance waits for it or is about to.
  if (options.recover || !seated(static_cast<int>(join.server()))) return {};
  if (stage != Stage::kJoining || failure) {
    return fmt::format("the instance of master {} has already started without room for {}. Fix: "
                       "restart all nodes", own, name);
  }
  return {};
}

bool Coordinator::State::of_present_generation(const FromNode& message) const {
  return message.incarnation() == generation.incarnation &&
         message.generation() == generation.number;
}

std::string Coordinator::State::handle(int index, const FromNode& message) {
  Node& node = nodes[static_cast<size_t>(index)];
  node.contact = Clock::now();
  const bool about_itself =
      message.has_heartbeat() || message.has_leave() || message.has_goodbye() || message.has_join();
  if (!about_itself && !of_present_generation(message)) {
    return fmt::format("{}: dropped a message of generation {} (incarnation {:016x}); the present "
                       "one is {} ({:016x})",
                       name_of(index), message.generation(), message.incarnation(),
                       generation.number, generation.incarnation);
  }
  // An echo of a generation that is over already.
  if (!about_itself && stage == Stage::kJoining) return {};
  switch (message.kind_case()) {
    case FromNode::kHeartbeat:
      node.ranks.clear();
      if (!seated(index)) return {};
      for (const auto& r : message.heartbeat().ranks()) {
        RankReport report{.rank = r.rank(), .pid = r.pid(), .state = printable(r.state(), 200)};
        for (const auto& [name, value] : r.counters())
          report.counters[printable(name, 100)] = value;
        node.ranks.push_back(std::move(report));
      }
      return {};
    case FromNode::kPrepared:
      node.endpoints.clear();
      for (const auto& e : message.prepared().endpoints()) {
        node.endpoints.push_back({.rank = e.rank(),
                                  .address = printable(e.address(), 100),
                                  .port = static_cast<uint16_t>(e.port())});
      }
      if (message.prepared().seats() != digest(generation.seats))
        fault(index, Code::kFailedPrecondition,
              fmt::format("{} planned with another cut of the model than the one that was decided",
                          name_of(index)),
              false);
      phase_done(index, "prepare");
      return {};
    case FromNode::kConnected: phase_done(index, "connect"); return {};
    case FromNode::kLoaded:
      node.load = {.kv_blocks = message.loaded().kv_blocks(),
                   .bytes_read = message.loaded().bytes_read()};
      phase_done(index, "load");
      return {};
    case FromNode::kAllocated: phase_done(index, "allocate"); return {};
    case FromNode::kServing: phase_done(index, "serve"); return {};
    case FromNode::kPhaseFailed:
      fault(index, code_of(message.phase_failed().code()),
            fmt::format("{} failed in phase {}: {}", name_of(index), phase,
                        printable(message.phase_failed().message())),
            true);
      return {};
    case FromNode::kFault:
      fault(index, code_of(message.fault().code()),
            named(name_of(index), printable(message.fault().message())),
            !message.fault().definite());
      return {};
    case FromNode::kLeave: {
      const std::string why = printable(message.leave().reason(), 400);
      const StreamId stream = node.stream;
      const std::string line = lose(index, "away", "it left: " + why);
      server->finish(stream);
      return line;
    }
    case FromNode::kGoodbye:
      node.state = NodeState::kStopped;
      node.untold = false;
      cv.notify_all();
      return {};
    case FromNode::kJoin:
    case FromNode::KIND_NOT_SET: break;
  }
  return {};  // a message of a newer version: versions agree, so this does not happen
}

void Coordinator::State::phase_done(int index, const std::string& name) {
  if (stage != Stage::kPhases || name != phase) return;
  nodes[static_cast<size_t>(index)].done = true;
  if (name == "serve") nodes[static_cast<size_t>(index)].state = NodeState::kServing;
  cv.notify_all();
}

std::string Coordinator::State::lose(int index, const std::string& verdict,
                                     const std::string& why) {
  Node& node = nodes[static_cast<size_t>(index)];
  if (node.stream == 0) return {};
  node.stream = 0;
  node.since = Clock::now();
  node.verdict = verdict;
  node.reason = verdict + ": " + why;
  cv.notify_all();
  if (stage == Stage::kEnding) {
    node.state = NodeState::kStopped;
    return {};
  }
  if (!seated(index)) {
    node.state = NodeState::kAbsent;
    return fmt::format("{} is {}: {}; it was a spare, nothing stops", name_of(index), verdict, why);
  }
  const std::string during = phase.empty() ? "" : " in phase " + phase;
  const std::string line = fmt::format("{} is {}{}: {}", name_of(index), verdict, during, why);
  if (stage == Stage::kJoining) {
    node.state = NodeState::kAbsent;
    if (!newcomer(index)) return line + "; waiting for it again";
    withdraw(index);
    return line + "; it was about to take over ranks, which are waited for where they were";
  }
  node.state = NodeState::kLost;
  if (failure && failure->server == index) return line;  // it said why, then went
  if (failure && failure->symptom && Clock::now() < failure->settles) {
    failure->also.insert(failure->also.begin(), failure->text);
    failure->text = line;
    failure->code = Code::kUnavailable;
    failure->server = index;
    failure->symptom = false;
    failure->recoverable = true;
  } else {
    fault(index, Code::kUnavailable, line, false);
  }
  return line;
}

void Coordinator::State::fault(int index, Code code, const std::string& text, bool symptom) {
  if (stage == Stage::kEnding || stage == Stage::kClosed) return;
  const bool recoverable = may_be_symptom(code) || stage == Stage::kServing;
  symptom = symptom && may_be_symptom(code);
  if (failure) {
    if (Clock::now() >= failure->settles) return;
    if (failure->symptom && !symptom) {
      failure->also.insert(failure->also.begin(), failure->text);
      failure->text = text;
      failure->code = code;
      failure->server = index;
      failure->symptom = false;
      failure->recoverable = recoverable;
    } else if (failure->server != index && failure->also.size() < 8) {
      failure->also.push_back(text);
    }
    return;
  }
  failure = Failure{.server = index,
                    .code = code,
                    .text = text,
                    .symptom = symptom,
                    .recoverable = recoverable};
  failure->settles = Clock::now() + (symptom ? Clock::duration(kSettle) : Clock::duration(0));
  if (stage != Stage::kJoining) {
    abort_reason = text;
    FromMaster message;
    message.mutable_abort()->set_reason(text);
    send_all(message);
  }
  cv.notify_all();
}

std::string Coordinator::State::notice() const {
  std::string here, missing;
  for (size_t i = 0; i < nodes.size(); ++i) {
    const Node& node = nodes[i];
    if (!seated(static_cast<int>(i))) {
      if (phase.empty() && node.stream != 0)
        here += fmt::format("{}{} (spare)", here.empty() ? "" : ", ", node.name);
      continue;
    }
    const bool own = static_cast<int>(i) == options.own_server;
    const bool good = phase.empty() ? node.state != NodeState::kAbsent : node.done;
    std::string& list = good ? here : missing;
    list += fmt::format("{}{}{}", list.empty() ? "" : ", ", node.name, own ? " (master)" : "");
    if (good) continue;
    if (phase.empty()) {
      list += fmt::format(" (for {:.0f} s{}{})", seconds_since(node.since),
                          node.reason.empty() ? "" : ", last: ", node.reason);
    } else {
      for (const RankReport& report : node.ranks)
        list += fmt::format(" [rank {} {}]", report.rank, report.state);
    }
  }
  if (phase.empty()) return fmt::format("here: {}; waiting for {}", here, missing);
  return fmt::format("phase {} for {:.0f} s; done: {}; waiting for {}", phase,
                     seconds_since(phase_since), here.empty() ? "none" : here, missing);
}

void Coordinator::State::tick() {
  std::unique_lock lock(mutex);
  auto last = Clock::now();
  while (!quit) {
    // A node whose silence reaches the limit before the next heartbeat is found then.
    auto wake = last + seconds(options.heartbeat_seconds);
    for (const Node& node : nodes)
      if (node.stream != 0) wake = std::min(wake, node.contact + seconds(options.lost_seconds));
    cv.wait_until(lock, wake, [&] { return quit; });
    const auto now = Clock::now();
    // If this process itself was held up, silence of the others proves nothing.
    const auto stall =
        std::max(now - last - seconds(1.5 * options.heartbeat_seconds), Clock::duration(0));
    last = now;
    std::vector<std::string> warnings;
    for (size_t i = 0; i < nodes.size(); ++i) {
      Node& node = nodes[i];
      if (node.stream == 0) continue;
      node.contact = std::min(node.contact + stall, now);
      if (now - node.contact < seconds(options.lost_seconds)) continue;
      const StreamId stream = node.stream;
      lock.unlock();
      const bool answers = host_answers(node.name);
      lock.lock();
      if (node.stream != stream || node.contact > now) continue;
      warnings.push_back(lose(
          static_cast<int>(i), answers ? "stuck" : "cut off",
          fmt::format("no sign of life for {:.1f} s; its host {}", seconds_since(node.contact),
                      answers ? "answers, so its node process stands still"
                              : "does not answer either")));
      server->cancel(stream);
    }
    for (const auto& [stream, waiting_stream] : pending) {
      if (now - waiting_stream.since > kJoinTimeout) server->cancel(stream);
    }
    if (const std::string line = grow_when_due(); !line.empty()) warnings.push_back(line);
    FromMaster heartbeat;
    heartbeat.mutable_heartbeat();
    send_all(heartbeat, true);
    if (phase_deadline && now > *phase_deadline && !failure) {
      for (size_t i = 0; i < nodes.size(); ++i) {
        if (nodes[i].done) continue;
        fault(static_cast<int>(i), Code::kDeadlineExceeded,
              fmt::format("node {} did not finish phase {} within {:.0f} s", nodes[i].name, phase,
                          options.phase_seconds),
              false);
        break;
      }
    }
    std::string line;
    const bool busy = waiting || (!phase.empty() && stage == Stage::kPhases && !failure);
    if (busy && now >= next_notice) {
      next_notice = now + seconds(options.notice_seconds);
      line = notice();
      FromMaster message;
      message.mutable_waiting()->set_line(line);
      send_all(message, false);  // a heartbeat is on its way: a droppable message would be dropped
    }
    lock.unlock();
    for (const std::string& warning : warnings) {
      if (!warning.empty()) log_warn("{}", warning);
    }
    if (!line.empty()) log_info("{}", line);
    lock.lock();
  }
}

void Coordinator::State::watch() {
  std::unique_lock lock(mutex);
  for (;;) {
    cv.wait(lock, [&] { return quit || (abort_reason && !abort_called); });
    if (!abort_reason || abort_called) return;
    const std::string reason = *abort_reason;
    const uint64_t number = generation.number;
    abort_called = aborting = true;
    lock.unlock();
    local.abort(reason);
    lock.lock();
    aborting = false;
    cv.notify_all();
    // Only a loss while serving is told here; before that, start() deals with it.
    const auto over = [&] {
      return quit || stage != Stage::kServing || generation.number != number || !failure;
    };
    if (over()) continue;
    const Clock::time_point settles = failure->settles;
    cv.wait_until(lock, settles, over);
    cv.wait(lock, [&] { return callback != nullptr || over(); });
    if (over()) continue;
    const std::string name = nodes[static_cast<size_t>(failure->server)].name;
    const Error error(failure->code, failure->full_text());
    const auto call = callback;
    lock.unlock();
    call(name, error);
    lock.lock();
  }
}

}  // namespace phalanx::cluster
