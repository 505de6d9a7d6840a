#pragma once

// Which cores of the machine the ranks of a node compute on, and who else of Phalanx uses them.

#include <memory>
#include <string>
#include <vector>

#include "apps/host.h"
#include "phalanx/base/unique_fd.h"

namespace phalanx::apps {

// A physical core and those of its hardware threads that this process may use, in order.
struct Core {
  std::vector<int> cpus;
  int node = 0;   // NUMA node
  int cache = 0;  // group of cores that share a last-level cache
};

// The cores that `allowed` touches, by NUMA node, cache, number, from hwloc. `synthetic`: a machine
// described in hwloc's notation ("node:2 l3:1 core:4 pu:2") instead of this one, for tests. When
// hwloc cannot read the machine, every CPU counts as a core of its own and `note` says so.
struct Topology {
  std::vector<Core> cores;
  int nodes = 1;
  bool hardware_threads = false;  // some core has several, allowed or not
  std::string note;
};
[[nodiscard]] Topology read_topology(const std::vector<int>& allowed,
                                     const std::string& synthetic = "");

// Cores lent to this process by lock files that all nodes of one user on one machine look at.
class CoreLeases {
 public:
  // Takes up to `wanted` of the CPUs in `order`, skipping those that others hold. folder is made
  // when it is absent. Throws Error(kUnavailable) when the folder cannot be used.
  CoreLeases(const std::string& folder, const std::vector<int>& order, int wanted);
  [[nodiscard]] const std::vector<int>& cpus() const { return cpus_; }

 private:
  std::vector<UniqueFd> locks_;
  std::vector<int> cpus_;
};

struct CoreRequest {
  int ranks = 1;             // of this node
  int sharing = 1;           // ranks of all nodes of this instance on this machine
  int threads_per_rank = 0;  // asked for; 0: what the cores give
  std::string cpus;          // PHALANX_CPUS: "" or "auto", "none", or a list as "0-3,8"
  std::string lease_folder;  // default_lease_folder()
};

struct CorePlan {
  int threads_per_rank = 1;
  std::vector<int> cpus;              // of the ranks in order; empty: not pinned
  std::string reason;                 // one line: what was chosen and why
  std::shared_ptr<CoreLeases> lease;  // held as long as any copy of the plan
};

// Threads: as asked, at most one for each CPU this process may use; else the physical cores, or
// the cgroup's quota where that is less, divided by `sharing`. Pinned to a core each, a rank's
// cores beside each other, when this process can have them for itself. Throws
// Error(kInvalidArgument) when PHALANX_CPUS is no list, or names a CPU this process may not use, or
// too few for the ranks.
[[nodiscard]] CorePlan plan_cores(const CoreRequest& request, const HostResources& host,
                                  const Topology& topology);

[[nodiscard]] std::string default_lease_folder();

}  // namespace phalanx::apps
