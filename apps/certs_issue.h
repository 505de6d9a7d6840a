#pragma once

#include <string>
#include <vector>

#include "phalanx/cluster/rank_table.h"

namespace phalanx::apps {

// The folder `phalanx certs init` fills, and what is done to it later. Throws Error with path and
// cause; what was written before stays and is sound.
struct IssueOptions {
  std::string folder;
  int days = 730;
};

// Makes the authority (unless the folder has one) and the files of every node and of a client.
void issue_all(const IssueOptions& options, const cluster::RankTable& table);
// New keys and certificates for `nodes` (all if empty) of the folder, with names and roles of the
// old ones, and a fresh revocation list.
void renew_all(const IssueOptions& options, const std::vector<std::string>& nodes);
// Puts the certificates of these nodes, or in these files, on the revocation list and gives every
// node of the folder the new list. Without either, only renews the list.
void revoke(const IssueOptions& options, const std::vector<std::string>& nodes,
            const std::vector<std::string>& files);

}  // namespace phalanx::apps
