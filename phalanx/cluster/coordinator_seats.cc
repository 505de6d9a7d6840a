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
  if (generation.numeric_class.empty()) return;
  for (size_t i = 0; i < nodes.size(); ++i) {
    Node& node = nodes[i];
    const auto& classes = node.offer.numeric_classes;
    if (node.stream == 0 || seated(static_cast<int>(i)) ||
        std::find(classes.begin(), classes.end(), generation.numeric_class) != classes.end())
      continue;
    node.reason = fmt::format(
        "node {} does not offer the numeric class {} that this instance computes in, so it cannot "
        "be its spare. Fix: run it on a machine that has it, without PHALANX_CPU_ISA",
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
  proven_seats = generation.seats;
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
  log_warn("{} did not return: {} of {} ranks go on, the model is cut anew: {}", gone, fewer.size(),
           generation.seats.size(), text_of(fewer, options.table));
  for (Node& node : nodes)
    if (node.stream == 0) node.ranks.clear();
  generation.seats = proven_seats = std::move(fewer);
  return true;
}

bool Coordinator::State::give_back(int server, const std::string& why) {
  if (stage != Stage::kPhases || !seated(server) || is_seated(proven_seats, server)) return false;
  Node& node = nodes[static_cast<size_t>(server)];
  node.unfit = why;
  node.reason = "could not take over: " + why;
  node.ranks.clear();
  generation.seats = proven_seats;
  log_warn("spare node {} is left alone until it joins again: {}", node.name, why);
  return true;
}

}  // namespace phalanx::cluster
