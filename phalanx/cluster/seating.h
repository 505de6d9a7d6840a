#pragma once

// Which server computes which rank in a generation, and with what share of the model: the rank
// table's, unless weights were measured, a spare stands in for a lost server, or fewer ranks go on.
// Pure decisions, made by the master and checked by everybody.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "phalanx/cluster/rank_table.h"

namespace phalanx::cluster {

struct Seat {
  int server = 0;     // index in server_list
  double weight = 1;  // share of the model
  bool operator==(const Seat&) const = default;
};
using Seating = std::vector<Seat>;  // by rank

// As the table has it; ranks whose weight is "auto" have 1.
[[nodiscard]] Seating table_seating(const RankTable& table);

[[nodiscard]] std::vector<double> weights_of(const Seating& seats);
// Ranks of a server, ascending.
[[nodiscard]] std::vector<int> ranks_of(const Seating& seats, int server);
[[nodiscard]] bool is_seated(const Seating& seats, int server);
// How many servers have a rank.
[[nodiscard]] int servers_of(const Seating& seats);
// Equal for equal seatings, different else.
[[nodiscard]] std::string digest(const Seating& seats);
// "10.0.0.1: ranks 0, 1 (weight 2); ..." by server.
[[nodiscard]] std::string text_of(const Seating& seats, const RankTable& table);

// The highest weight that is decided; they are whole numbers from 1.
inline constexpr int kWeightSteps = 16;
// Bandwidths that differ by no more than this part of the higher one count as equal.
inline constexpr double kEqualBandwidth = 0.1;

// A server that cannot hold its ranks, and why.
struct Misfit {
  int server = 0;
  std::string reason;
};
// Who cannot hold its ranks; nothing if everybody can. Prompt.
using Fit = std::function<std::optional<Misfit>(const Seating& seats)>;

// The table's seating with weights for the ranks that have "auto", from the read bandwidth that each
// server measured (bytes per second by server; divided among its ranks). The highest gets 16, the
// others in proportion, rounded, at least 1; bandwidths within 10 % of each other get the same (their
// mean's); a common divisor is taken out. Beside weights given by hand, those count as 16 over the
// highest, and a unit of weight is what those ranks measured per unit. Where a server has no room
// (`fit`), its measured weights are lowered until it has. Throws Error(kFailedPrecondition) naming a
// server without a measurement, Error(kResourceExhausted) with the reason if nothing fits. An empty
// `fit` fits always.
[[nodiscard]] Seating decide_weights(const RankTable& table,
                                     const std::vector<double>& bytes_per_second, const Fit& fit);

// Why a node may not follow an order with this seating, or nothing: every rank at a server of the
// table and rank 0 at its master; weights of the table where it has numbers, else whole numbers of 1
// to 16 - unless fewer ranks than the table's go on, which keep the weights that they had.
[[nodiscard]] std::string seating_problem(const Seating& seats, const RankTable& table);

}  // namespace phalanx::cluster
