#include "phalanx/cluster/seating.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "phalanx/net/digest.h"

namespace phalanx::cluster {
namespace {

// Equal where they are close: the fastest of a group and all that are within a tenth of it.
void even_out(std::vector<double>& values) {
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return values[a] > values[b]; });
  for (size_t begin = 0; begin < order.size();) {
    const double least = values[order[begin]] * (1 - kEqualBandwidth);
    size_t end = begin;
    double sum = 0;
    while (end < order.size() && values[order[end]] >= least) sum += values[order[end++]];
    const double mean = sum / static_cast<double>(end - begin);
    for (; begin < end; ++begin) values[order[begin]] = mean;
  }
}

void take_out_common_divisor(Seating& seats) {
  int divisor = 0;
  for (const Seat& seat : seats) divisor = std::gcd(divisor, static_cast<int>(seat.weight));
  for (Seat& seat : seats) seat.weight /= divisor;
}

}  // namespace

Seating table_seating(const RankTable& table) {
  Seating seats(static_cast<size_t>(table.world_size));
  for (size_t s = 0; s < table.servers.size(); ++s) {
    for (const Device& device : table.servers[s].devices) {
      if (device.rank_id >= 0)
        seats.at(static_cast<size_t>(device.rank_id)) = {
            .server = static_cast<int>(s), .weight = device.auto_weight ? 1 : device.weight};
    }
  }
  return seats;
}

std::vector<double> weights_of(const Seating& seats) {
  std::vector<double> weights;
  for (const Seat& seat : seats) weights.push_back(seat.weight);
  return weights;
}

std::vector<int> ranks_of(const Seating& seats, int server) {
  std::vector<int> ranks;
  for (size_t rank = 0; rank < seats.size(); ++rank)
    if (seats[rank].server == server) ranks.push_back(static_cast<int>(rank));
  return ranks;
}

bool is_seated(const Seating& seats, int server) {
  return std::any_of(seats.begin(), seats.end(),
                     [&](const Seat& seat) { return seat.server == server; });
}

int servers_of(const Seating& seats) {
  std::set<int> servers;
  for (const Seat& seat : seats) servers.insert(seat.server);
  return static_cast<int>(servers.size());
}

std::string digest(const Seating& seats) {
  std::string text;
  for (const Seat& seat : seats) text += fmt::format("{}:{};", seat.server, seat.weight);
  return net::sha256_hex(text);
}

std::string text_of(const Seating& seats, const RankTable& table) {
  std::string text;
  for (size_t s = 0; s < table.servers.size(); ++s) {
    const std::vector<int> ranks = ranks_of(seats, static_cast<int>(s));
    if (ranks.empty()) continue;
    std::vector<std::string> weights;
    for (const int rank : ranks)
      weights.push_back(fmt::format("{:g}", seats[static_cast<size_t>(rank)].weight));
    text += fmt::format("{}{}: rank{} {} (weight{} {})", text.empty() ? "" : "; ",
                        table.servers[s].address(), ranks.size() == 1 ? "" : "s",
                        fmt::join(ranks, ", "), ranks.size() == 1 ? "" : "s",
                        fmt::join(weights, ", "));
  }
  return text;
}

Seating decide_weights(const RankTable& table, const std::vector<double>& bytes_per_second,
                       const Fit& fit) {
  Seating seats = table_seating(table);
  std::vector<double> speeds;  // by rank
  std::vector<bool> decided;
  double given = 0;            // weights given by hand, and what those ranks measured
  double given_speed = 0;
  for (size_t rank = 0; rank < seats.size(); ++rank) {
    const int server = seats[rank].server;
    const double speed = bytes_per_second.at(static_cast<size_t>(server));
    if (!(speed > 0) || !std::isfinite(speed))
      throw Error(Code::kFailedPrecondition,
                  fmt::format("node {} measured no memory bandwidth, which \"weight\": \"auto\" of "
                              "the rank table needs. Fix: give numbers as weights",
                              table.servers[static_cast<size_t>(server)].address()));
    speeds.push_back(speed / static_cast<double>(ranks_of(seats, server).size()));
    decided.push_back(table.device_of_rank(static_cast<int>(rank)).auto_weight);
  }
  even_out(speeds);
  for (size_t rank = 0; rank < seats.size(); ++rank) {
    if (decided[rank]) continue;
    given += seats[rank].weight;
    given_speed += speeds[rank];
  }
  const double unit = given > 0 ? given_speed / given : 1;
  double most = 0;
  for (size_t rank = 0; rank < seats.size(); ++rank) {
    if (decided[rank]) seats[rank].weight = speeds[rank] / unit;
    most = std::max(most, seats[rank].weight);
  }
  for (size_t rank = 0; rank < seats.size(); ++rank) {
    double& weight = seats[rank].weight;
    weight *= kWeightSteps / most;
    if (decided[rank]) weight = std::max(1.0, std::round(weight));
  }
  while (const auto misfit = fit ? fit(seats) : std::nullopt) {
    bool lowered = false;
    for (size_t rank = 0; rank < seats.size(); ++rank) {
      if (seats[rank].server != misfit->server || !decided[rank] || seats[rank].weight <= 1)
        continue;
      seats[rank].weight -= 1;
      lowered = true;
    }
    if (!lowered) throw Error(Code::kResourceExhausted, misfit->reason);
  }
  if (given == 0) take_out_common_divisor(seats);
  return seats;
}

std::string seating_problem(const Seating& seats, const RankTable& table) {
  if (seats.empty() || seats.size() > static_cast<size_t>(table.world_size))
    return fmt::format("it has {} ranks, the rank table {}", seats.size(), table.world_size);
  const Seating ours = table_seating(table);
  // A weight of a table with numbers alone; with "auto" the numbers are scaled.
  const bool by_hand = !table.has_auto_weights();
  for (size_t rank = 0; rank < seats.size(); ++rank) {
    const Seat& seat = seats[rank];
    if (seat.server < 0 || static_cast<size_t>(seat.server) >= table.servers.size())
      return fmt::format("rank {} is at server_list[{}], which the rank table lacks", rank,
                         seat.server);
    if (!std::isfinite(seat.weight) || seat.weight <= 0 || seat.weight > 1e6)
      return fmt::format("the weight {} of rank {} is no share", seat.weight, rank);
    if (!by_hand && seat.weight > kWeightSteps)
      return fmt::format("the decided weight {} of rank {} is above {}", seat.weight, rank,
                         kWeightSteps);
    if (by_hand && seats.size() == ours.size() && seat.weight != ours[rank].weight)
      return fmt::format("the weight {} of rank {} is {} in this node's rank table", seat.weight,
                         rank, ours[rank].weight);
  }
  if (seats[0].server != table.master())
    return fmt::format("rank 0 is not at the master {}",
                       table.servers[static_cast<size_t>(table.master())].address());
  return {};
}

}  // namespace phalanx::cluster
