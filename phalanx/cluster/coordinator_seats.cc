// Who computes what in the next generation: measured weights, spares in the place of lost nodes,
// fewer ranks.

#include <fmt/format.h>

#include <algorithm>

#include "control.pb.h"
#include "phalanx/base/log.h"
#include "phalanx/cluster/coordinator_state.h"
#include "phalanx/cluster/join_check.h"

namespace phalanx::cluster {
namespace {

constexpr int kNewcomerAttempts = 3;  // to serve with a node that took over ranks

Clock::duration seconds(double value) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(value));
}

}  // namespace

std::optional<Misfit> Coordinator::State::misfit(const Seating& seats) const {
  if (!options.misfit) return std::nullopt;
  std::vector<NodeOffer> offers;
  for (const Node& node : nodes) offers.push_back(node.offer);
  return options.misfit(seats, offers);
}

void Coordinator::State::refuse_other_classes() {
  if (generation.numeric_class.empty() || options.mixed_classes) return;
  for (size_t i = 0; i < nodes.size(); ++i) {
    Node& node = nodes[i];
    const auto& classes = node.offer.numeric_classes;
    if (node.stream == 0 || seated(static_cast<int>(i)) ||
        std::find(classes.begin(), classes.end(), generation.numeric_class) != classes.end())
      continue;
    node.reason = fmt::format(
        "node {} does not offer the numeric class {} that this instance computes in, so it cannot "
        "be its spare. Fix: run it on a machine that has it, without PHALANX_CPU_ISA, or start all "
        "nodes with --isa mixed, which gives up equal tokens",
        node.name, generation.numeric_class);
    control::v1::FromMaster message;
    message.mutable_fail()->set_code(static_cast<int>(Code::kFailedPrecondition));
    message.mutable_fail()->set_message(node.reason);
    server->send(node.stream, message);
    server->finish(node.stream);
    log_warn("refused: {}", node.reason);
  }
}

void Coordinator::State::decide_seats(std::unique_lock<std::mutex>& lock) {
  if (!options.table.has_auto_weights()) return;
  std::vector<double> speeds;
  std::string measured;
  for (size_t i = 0; i < nodes.size(); ++i) {
    speeds.push_back(nodes[i].offer.bytes_per_second);
    if (seated(static_cast<int>(i)))
      measured += fmt::format("{}{} {:.1f} GB/s", measured.empty() ? "" : ", ", nodes[i].name,
                              speeds.back() / 1e9);
  }
  // Ranks of one server are equal, whatever it would measure.
  if (servers_of(generation.seats) == 1) speeds.assign(nodes.size(), 1);
  try {
    generation.seats = decide_weights(options.table, speeds,
                                      [&](const Seating& seats) { return misfit(seats); });
  } catch (const Error& e) {
    fault(options.own_server, e.code(), e.what(), false);
    throw_if_over(lock);
  }
  proven_seats = full_seats = generation.seats;
  log_info("weights decided from measured memory bandwidth ({}): {}", measured,
           text_of(generation.seats, options.table));
}

int Coordinator::State::stand_in_for(int lost) {
  for (size_t i = 0; i < nodes.size(); ++i) {
    Node& node = nodes[i];
    const int spare = static_cast<int>(i);
    if (!here(spare) || seated(spare) || !node.unfit.empty()) continue;
    Seating seats = generation.seats;
    for (Seat& seat : seats)
      if (seat.server == lost) seat.server = spare;
    const auto found = misfit(seats);
    if (!found || found->server != spare) return spare;
    node.unfit = found->reason;
    node.reason = "cannot take over the ranks of " +
                  nodes[static_cast<size_t>(lost)].name + ": " + node.unfit;
    log_warn("{} (spare) {}", name_of(spare), node.reason);
  }
  return -1;
}

Clock::time_point Coordinator::State::next_take_over() const {
  auto next = give_up;
  if (generation.number == 0 || !options.recover) return next;
  for (const Seat& seat : generation.seats) {
    if (here(seat.server)) continue;
    const auto due = nodes[static_cast<size_t>(seat.server)].since + seconds(options.spare_seconds);
    if (due > Clock::now()) next = std::min(next, due);
  }
  return next;
}

bool Coordinator::State::take_over_due() {
  if (generation.number == 0 || !options.recover) return false;
  return std::any_of(generation.seats.begin(), generation.seats.end(), [&](const Seat& seat) {
    return !here(seat.server) &&
           nodes[static_cast<size_t>(seat.server)].since + seconds(options.spare_seconds) <=
               Clock::now() &&
           stand_in_for(seat.server) >= 0;
  });
}

void Coordinator::State::take_over() {
  for (size_t i = 0; i < nodes.size(); ++i) {
    const int lost = static_cast<int>(i);
    Node& node = nodes[i];
    if (!seated(lost) || here(lost) ||
        node.since + seconds(options.spare_seconds) > Clock::now())
      continue;
    const int spare = stand_in_for(lost);
    if (spare < 0) continue;
    const std::chrono::duration<double> away = Clock::now() - node.since;
    const std::vector<int> ranks = ranks_of(generation.seats, lost);
    log_warn("spare node {} takes over rank{} {} of {}, which has been away for {:.1f} s ({})",
             nodes[static_cast<size_t>(spare)].name, ranks.size() == 1 ? "" : "s",
             fmt::join(ranks, ", "), node.name, away.count(), node.reason);
    for (Seat& seat : generation.seats)
      if (seat.server == lost) seat.server = spare;
    node.ranks.clear();
    nodes[static_cast<size_t>(spare)].state = NodeState::kJoined;
  }
}

bool Coordinator::State::shrink() {
  Seating fewer;
  std::string gone;
  for (const Seat& seat : generation.seats) {
    if (here(seat.server)) {
      fewer.push_back(seat);
    } else if (const std::string& name = nodes[static_cast<size_t>(seat.server)].name;
               gone.find(name) == std::string::npos) {
      gone += (gone.empty() ? "" : ", ") + name;
    }
  }
  if (const auto found = misfit(fewer)) {
    log_error("{} did not return, and {} ranks cannot go on: {}", gone, fewer.size(),
              found->reason);
    return false;
  }
  log_warn(
      "{} did not return: {} of {} ranks go on, the model is cut anew: {}. Once {} or a spare is "
      "here for {:g} s, all ranks are formed again",
      gone, fewer.size(), generation.seats.size(), text_of(fewer, options.table), gone,
      options.spare_seconds);
  for (Node& node : nodes)
    if (node.stream == 0) node.ranks.clear();
  generation.seats = proven_seats = std::move(fewer);
  return true;
}

void Coordinator::State::withdraw(int server) {
  if (generation.seats.size() != proven_seats.size()) {
    generation.seats = proven_seats;
  } else {
    for (size_t rank = 0; rank < proven_seats.size(); ++rank)
      if (generation.seats[rank].server == server) generation.seats[rank] = proven_seats[rank];
  }
  for (size_t i = 0; i < nodes.size(); ++i)
    if (!seated(static_cast<int>(i))) nodes[i].ranks.clear();
  attempts = 0;
}

bool Coordinator::State::try_again() {
  if (stage == Stage::kJoining || generation.seats == proven_seats)
    return failure->recoverable && Clock::now() < give_up;
  const int failed = failure->server;
  const bool gone = !here(failed);
  if (failure->recoverable && gone && !newcomer(failed)) return true;
  if (failure->recoverable && !gone && ++attempts < kNewcomerAttempts) return true;
  const bool grew = generation.seats.size() != proven_seats.size();
  const std::string why = failure->full_text();
  const bool known = newcomer(failed);  // else nobody knows which newcomer it was about
  for (size_t i = 0; i < nodes.size(); ++i) {
    const int server = static_cast<int>(i);
    Node& node = nodes[i];
    if (!newcomer(server) || (known && server != failed)) continue;
    if (here(server)) {
      node.unfit = why;
      node.reason = "could not take over: " + why;
      log_warn("spare node {} is left alone until it joins again: {}", node.name, why);
    } else {
      log_warn("spare node {} left while it took over: {}", node.name, why);
    }
    withdraw(server);
  }
  if (grew) {
    ++growths_failed;
    log_warn("{} of {} ranks go on as before", generation.seats.size(), full_seats.size());
  }
  // The seats that served last have the time of a loss of their own.
  give_up = std::max(give_up, Deadline::in_seconds(options.recovery_seconds).when());
  return true;
}

std::optional<Seating> Coordinator::State::full_again() {
  if (generation.number == 0 || generation.seats.size() == full_seats.size()) return std::nullopt;
  const auto usable = [&](int server) {
    return here(server) && nodes[static_cast<size_t>(server)].unfit.empty();
  };
  Seating seats = full_seats;
  for (size_t lost = 0; lost < nodes.size(); ++lost) {
    const int from = static_cast<int>(lost);
    if (!is_seated(seats, from) || usable(from)) continue;
    int to = 0;
    while (to < static_cast<int>(nodes.size()) && (!usable(to) || is_seated(seats, to))) ++to;
    if (to == static_cast<int>(nodes.size())) return std::nullopt;
    for (Seat& seat : seats)
      if (seat.server == from) seat.server = to;
  }
  const auto found = misfit(seats);
  if (!found) return seats;
  for (size_t i = 0; i < nodes.size(); ++i) {
    const int server = static_cast<int>(i);
    if (!is_seated(seats, server) || seated(server) ||
        (!seated(found->server) && server != found->server))
      continue;
    nodes[i].unfit = found->reason;
    nodes[i].reason = "cannot have ranks again: " + found->reason;
    log_warn("{} (spare) {}", name_of(server), nodes[i].reason);
  }
  return std::nullopt;
}

double Coordinator::State::growth_wait() const {
  if (growths_failed == 0) return options.spare_seconds;
  return std::max(options.spare_seconds, 1.0) * (1 << std::min(growths_failed, 6));
}

std::string Coordinator::State::grow_when_due() {
  if (stage != Stage::kServing || failure || !options.recover) return {};
  const auto seats = full_again();
  if (!seats) return {};
  std::string added;
  Clock::time_point last;
  for (size_t i = 0; i < nodes.size(); ++i) {
    const int server = static_cast<int>(i);
    if (seated(server) || !is_seated(*seats, server)) continue;
    last = std::max(last, nodes[i].since);
    added += (added.empty() ? "" : ", ") + nodes[i].name;
  }
  if (last + seconds(growth_wait()) > Clock::now()) return {};
  fault(options.own_server, Code::kAborted,
        fmt::format("{} ends generation {}: {} {} here, and {} of {} ranks are formed again, with "
                    "the model cut anew",
                    name_of(options.own_server), generation.number, added,
                    added.find(',') == std::string::npos ? "is" : "are", seats->size(),
                    full_seats.size()),
        false);
  return fmt::format(
      "{} has been here for {:.1f} s: {} ranks instead of {} go on, running requests "
      "pause meanwhile: {}",
      added, std::chrono::duration<double>(Clock::now() - last).count(), seats->size(),
      generation.seats.size(), text_of(*seats, options.table));
}

std::string Coordinator::State::why_without_ranks(int server) const {
  const std::vector<int> had = ranks_of(table_seating(options.table), server);
  if (had.empty()) return {};
  const std::string ranks =
      fmt::format("rank{} {}", had.size() == 1 ? "" : "s", fmt::join(had, ", "));
  if (generation.seats.size() != full_seats.size())
    return fmt::format(
        "while it was away the others went on as {} of {} ranks; it has {} again "
        "once it has been here for {:g} s",
        generation.seats.size(), full_seats.size(), ranks,
        growth_wait());
  const int at = generation.seats[static_cast<size_t>(had.front())].server;
  return fmt::format("node {} took over its {} while it was away",
                     nodes[static_cast<size_t>(at)].name, ranks);
}

void Coordinator::State::send_standby(int server_index) {
  control::v1::FromMaster standby;
  standby.mutable_standby()->set_reason(why_without_ranks(server_index));
  server->send(nodes[static_cast<size_t>(server_index)].stream, standby);
}

}  // namespace phalanx::cluster
