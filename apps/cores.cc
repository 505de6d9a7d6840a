#include "apps/cores.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <hwloc.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <set>
#include <string_view>
#include <tuple>

#include "phalanx/base/error.h"

namespace phalanx::apps {
namespace {

constexpr int kMostCpus = 8192;

struct FreeTopology {
  void operator()(hwloc_topology_t t) const { hwloc_topology_destroy(t); }
};
using OwnedTopology = std::unique_ptr<std::remove_pointer_t<hwloc_topology_t>, FreeTopology>;

OwnedTopology load_topology(const std::string& synthetic) {
  hwloc_topology_t raw = nullptr;
  if (hwloc_topology_init(&raw) != 0) return nullptr;
  OwnedTopology topology(raw);
  if (!synthetic.empty() && hwloc_topology_set_synthetic(raw, synthetic.c_str()) != 0)
    return nullptr;
  // Also what this process may not use, so that it is known which CPUs are siblings.
  (void)hwloc_topology_set_flags(raw, HWLOC_TOPOLOGY_FLAG_INCLUDE_DISALLOWED);
  if (hwloc_topology_load(raw) != 0) return nullptr;
  return topology;
}

[[noreturn]] void refuse_cpus(const std::string& found, const std::string& expected) {
  throw Error(
      Code::kInvalidArgument,
      to_string(Problem{.what = "CPUs that the ranks cannot be pinned to",
                        .where = "environment variable PHALANX_CPUS",
                        .found = "\"" + found + "\"",
                        .expected = expected,
                        .fix = "unset PHALANX_CPUS to let the node choose, or set it to none "
                               "to pin nothing"}));
}

// "0-3,8" to 0, 1, 2, 3, 8.
std::vector<int> parse_cpus(const std::string& text) {
  const std::string expected = "auto, none, or CPU numbers such as 0-3,8, each once";
  std::vector<int> cpus;
  std::string_view rest = text;
  while (true) {
    const std::string_view piece = rest.substr(0, rest.find(','));
    int first = 0;
    const char* end = piece.data() + piece.size();
    auto [at, error] = std::from_chars(piece.data(), end, first);
    int last = first;
    if (error == std::errc() && at != end && *at == '-')
      std::tie(at, error) = [&] {
        const auto result = std::from_chars(at + 1, end, last);
        return std::tuple(result.ptr, result.ec);
      }();
    if (error != std::errc() || at != end || first < 0 || last < first || last >= kMostCpus)
      refuse_cpus(text, expected);
    for (int cpu = first; cpu <= last; ++cpu) {
      if (std::find(cpus.begin(), cpus.end(), cpu) != cpus.end()) refuse_cpus(text, expected);
      cpus.push_back(cpu);
    }
    if (piece.size() == rest.size()) return cpus;
    rest.remove_prefix(piece.size() + 1);
  }
}

std::string plural(int n, std::string_view thing) {
  return fmt::format("{} {}{}", n, thing, n == 1 ? "" : "s");
}

CorePlan plan_named(const CoreRequest& request, const HostResources& host) {
  CorePlan plan;
  plan.cpus = parse_cpus(request.cpus);
  for (const int cpu : plan.cpus)
    if (std::find(host.cpus.begin(), host.cpus.end(), cpu) == host.cpus.end())
      refuse_cpus(request.cpus,
                  fmt::format("CPUs of this process's affinity mask and cpuset ({}); it lacks {}",
                              fmt::join(host.cpus, ","), cpu));
  const int named = static_cast<int>(plan.cpus.size());
  plan.threads_per_rank =
      request.threads_per_rank > 0 ? request.threads_per_rank : named / request.ranks;
  const int needed = std::max(1, plan.threads_per_rank) * request.ranks;
  if (named < needed)
    refuse_cpus(request.cpus,
                fmt::format("at least {} for {} of {} each, found {}", needed,
                            plural(request.ranks, "rank"),
                            plural(std::max(1, plan.threads_per_rank), "thread"), named));
  plan.cpus.resize(static_cast<size_t>(needed));
  plan.reason = fmt::format("{} per rank, pinned to CPUs {} as PHALANX_CPUS says",
                            plural(plan.threads_per_rank, "thread"), fmt::join(plan.cpus, ","));
  return plan;
}

}  // namespace

Topology read_topology(const std::vector<int>& allowed, const std::string& synthetic) {
  Topology topology;
  const OwnedTopology hw = load_topology(synthetic);
  if (hw == nullptr) {
    topology.note = "hwloc cannot read this machine, every CPU counts as a core";
    for (const int cpu : allowed) topology.cores.push_back({.cpus = {cpu}});
    return topology;
  }
  std::set<int> nodes;
  std::vector<bool> known(kMostCpus, false);
  const int cores = std::max(0, hwloc_get_nbobjs_by_type(hw.get(), HWLOC_OBJ_CORE));
  for (int i = 0; i < cores; ++i) {
    const hwloc_obj_t core =
        hwloc_get_obj_by_type(hw.get(), HWLOC_OBJ_CORE, static_cast<unsigned>(i));
    topology.hardware_threads |= hwloc_bitmap_weight(core->cpuset) > 1;
    Core found;
    for (const int cpu : allowed) {
      if (!hwloc_bitmap_isset(core->cpuset, static_cast<unsigned>(cpu))) continue;
      found.cpus.push_back(cpu);
      known[static_cast<size_t>(cpu)] = true;
    }
    if (found.cpus.empty()) continue;
    const int node = hwloc_bitmap_first(core->nodeset);
    found.node = std::max(0, node);
    const hwloc_obj_t cache = hwloc_get_ancestor_obj_by_type(hw.get(), HWLOC_OBJ_L3CACHE, core);
    found.cache = cache != nullptr ? static_cast<int>(cache->logical_index) : 0;
    nodes.insert(found.node);
    topology.cores.push_back(found);
  }
  for (const int cpu : allowed)
    if (cpu < 0 || cpu >= kMostCpus || !known[static_cast<size_t>(cpu)])
      topology.cores.push_back({.cpus = {cpu}});
  topology.nodes = std::max<int>(1, static_cast<int>(nodes.size()));
  std::stable_sort(topology.cores.begin(), topology.cores.end(), [](const Core& a, const Core& b) {
    return std::tuple(a.node, a.cache, a.cpus[0]) < std::tuple(b.node, b.cache, b.cpus[0]);
  });
  return topology;
}

CoreLeases::CoreLeases(const std::string& folder, const std::vector<int>& order, int wanted) {
  auto fail = [&](const std::string& what) {
    throw Error(Code::kUnavailable, fmt::format("{}: {}", folder, what));
  };
  if (::mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) fail(std::strerror(errno));
  const UniqueFd at(::open(folder.c_str(), O_DIRECTORY | O_NOFOLLOW | O_RDONLY | O_CLOEXEC));
  if (!at.valid()) fail(std::strerror(errno));
  struct stat status {};
  if (::fstat(at.get(), &status) != 0) fail(std::strerror(errno));
  if (status.st_uid != ::geteuid()) fail("belongs to another user");
  for (const int cpu : order) {
    if (static_cast<int>(cpus_.size()) == wanted) return;
    UniqueFd lock(::openat(at.get(), fmt::format("cpu{}", cpu).c_str(),
                           O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600));
    if (!lock.valid()) fail(std::strerror(errno));
    if (::flock(lock.get(), LOCK_EX | LOCK_NB) != 0) continue;  // someone else's
    locks_.push_back(std::move(lock));
    cpus_.push_back(cpu);
  }
}

CorePlan plan_cores(const CoreRequest& request, const HostResources& host,
                    const Topology& topology) {
  if (!request.cpus.empty() && request.cpus != "auto" && request.cpus != "none")
    return plan_named(request, host);
  const auto cores = static_cast<int>(topology.cores.size());
  const auto cpus = static_cast<int>(host.cpus.size());
  const bool limited = host.cpu_quota > 0 && host.usable_cores() < cores;
  const int usable = std::max(1, limited ? host.usable_cores() : cores);
  CorePlan plan;
  std::string chosen;
  if (request.threads_per_rank > 0) {
    plan.threads_per_rank = std::min(request.threads_per_rank, std::max(1, cpus));
    chosen = plan.threads_per_rank < request.threads_per_rank
                 ? fmt::format("{} per rank ({} asked for, this process may use {})",
                               plural(plan.threads_per_rank, "thread"), request.threads_per_rank,
                               plural(cpus, "CPU"))
                 : fmt::format("{} per rank as asked for", plural(plan.threads_per_rank, "thread"));
  } else {
    plan.threads_per_rank = std::max(1, usable / request.sharing);
    chosen = fmt::format("{} per rank ({}{} for {} on this machine)",
                         plural(plan.threads_per_rank, "thread"),
                         limited ? fmt::format("the cgroup's quota of {:.3g} cores", host.cpu_quota)
                                 : plural(cores, "core"),
                         topology.hardware_threads ? ", second hardware threads left alone" : "",
                         plural(request.sharing, "rank"));
  }
  if (!topology.note.empty()) chosen += "; " + topology.note;
  const int needed = plan.threads_per_rank * request.ranks;
  auto unpinned = [&](const std::string& why) {
    plan.reason = fmt::format("{}; not pinned: {}", chosen, why);
    return plan;
  };
  if (request.cpus == "none") return unpinned("PHALANX_CPUS is none");
  if (limited) return unpinned("the quota moves between CPUs");
  if (needed > cores)
    return unpinned(
        fmt::format("{} of this node for {}", plural(needed, "thread"), plural(cores, "core")));
  std::vector<int> order;
  for (const Core& core : topology.cores) order.push_back(core.cpus[0]);
  try {
    auto lease = std::make_shared<CoreLeases>(request.lease_folder, order, needed);
    if (static_cast<int>(lease->cpus().size()) < needed)
      return unpinned(fmt::format("other Phalanx processes hold {} of the {} cores in {}",
                                  cores - static_cast<int>(lease->cpus().size()), cores,
                                  request.lease_folder));
    plan.lease = std::move(lease);
  } catch (const Error& e) {
    return unpinned(fmt::format("cores cannot be leased in {}", e.what()));
  }
  plan.cpus = plan.lease->cpus();
  plan.reason = fmt::format(
      "{}, pinned to CPUs {}{}", chosen, fmt::join(plan.cpus, ","),
      topology.nodes > 1 ? fmt::format(" of {}", plural(topology.nodes, "NUMA node")) : "");
  return plan;
}

std::string default_lease_folder() {
  return fmt::format("/tmp/phalanx-cores-{}", static_cast<unsigned>(::geteuid()));
}

}  // namespace phalanx::apps
