#pragma once

#include <string>
#include <vector>

#include "phalanx/comm/bootstrap.h"

namespace phalanx::comm {

// Who lives where, seen by one rank. Node indices are dense here, whatever the members say.
struct Topology {
  int rank = 0;
  int node = 0;                          // own
  int local = 0;                         // own place among the ranks of the node
  std::vector<std::vector<int>> nodes;   // ranks of each node, ascending
  std::vector<int> node_of;              // by rank
  std::vector<int> local_of;             // by rank
  std::vector<std::string> names;        // by rank: "rank 3 (host-b)"

  [[nodiscard]] int size() const { return static_cast<int>(node_of.size()); }
  [[nodiscard]] const std::vector<int>& own_node() const { return nodes[node]; }
  // The rank of `at_node` that receives what `from` sends to that node, so that it crosses the
  // network once and the work is spread over the node's ranks.
  [[nodiscard]] int receiver(int at_node, int from) const {
    return nodes[at_node][static_cast<size_t>(local_of[from]) % nodes[at_node].size()];
  }
};

// Throws Error(kInvalidArgument) if members are not numbered 0..n-1 in order or `rank` is not one.
[[nodiscard]] Topology make_topology(const std::vector<Member>& members, int rank);

}  // namespace phalanx::comm
