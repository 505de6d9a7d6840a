#include "phalanx/comm/topology.h"

#include <fmt/format.h>

#include <map>

#include "phalanx/base/error.h"

namespace phalanx::comm {

Topology make_topology(const std::vector<Member>& members, int rank) {
  if (members.empty() || members.size() > 65536)
    throw Error(Code::kInvalidArgument,
                fmt::format("group: found {} members, expected 1 to 65536", members.size()));
  for (size_t i = 0; i < members.size(); ++i)
    if (members[i].rank != static_cast<int>(i))
      throw Error(Code::kInvalidArgument,
                  fmt::format("group: found rank {} at place {} of the members, expected {}. Fix: "
                              "list the members by rank, without gaps",
                              members[i].rank, i, i));
  if (rank < 0 || rank >= static_cast<int>(members.size()))
    throw Error(Code::kInvalidArgument,
                fmt::format("group: own rank {} is none of the {} members", rank, members.size()));
  Topology topology;
  topology.rank = rank;
  std::map<int, int> dense;
  for (const Member& member : members) {
    const auto [at, added] = dense.try_emplace(member.node, static_cast<int>(dense.size()));
    if (added) topology.nodes.emplace_back();
    auto& ranks = topology.nodes[at->second];
    topology.node_of.push_back(at->second);
    topology.local_of.push_back(static_cast<int>(ranks.size()));
    ranks.push_back(member.rank);
    topology.names.push_back(fmt::format("rank {} ({})", member.rank, member.host));
  }
  topology.node = topology.node_of[rank];
  topology.local = topology.local_of[rank];
  return topology;
}

}  // namespace phalanx::comm
