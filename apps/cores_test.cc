#include "apps/cores.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <numeric>

#include "phalanx/base/error.h"

namespace phalanx::apps {
namespace {

std::vector<int> first_cpus(int n) {
  std::vector<int> cpus(static_cast<size_t>(n));
  std::iota(cpus.begin(), cpus.end(), 0);
  return cpus;
}

class Cores : public testing::Test {
 protected:
  Cores() : folder_(testing::TempDir() + "cores-" + std::to_string(::getpid())) {}
  ~Cores() override { std::filesystem::remove_all(folder_); }

  CoreRequest request(int ranks, int sharing, int threads = 0, std::string cpus = "") const {
    return {.ranks = ranks,
            .sharing = sharing,
            .threads_per_rank = threads,
            .cpus = std::move(cpus),
            .lease_folder = folder_};
  }
  static bool has(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
  }
  std::string folder_;
};

TEST_F(Cores, RanksGetCoresOfOneNodeAndLeaveSiblingsAlone) {
  const HostResources host{.cpus = first_cpus(16)};
  const Topology topology = read_topology(host.cpus, "node:2 l3:1 core:4 pu:2");
  ASSERT_EQ(topology.cores.size(), 8u);
  EXPECT_TRUE(topology.hardware_threads);
  EXPECT_EQ(topology.nodes, 2);
  const CorePlan plan = plan_cores(request(2, 2), host, topology);
  EXPECT_EQ(plan.threads_per_rank, 4);
  EXPECT_EQ(plan.cpus, (std::vector<int>{0, 2, 4, 6, 8, 10, 12, 14}));
  EXPECT_TRUE(has(plan.reason, "4 threads per rank (8 cores, second hardware threads left alone"))
      << plan.reason;
  EXPECT_TRUE(has(plan.reason, "pinned to CPUs 0,2,4,6,8,10,12,14 of 2 NUMA nodes")) << plan.reason;
}

TEST_F(Cores, AffinityMaskIsRespected) {
  const HostResources host{.cpus = {3, 5, 6}};
  const Topology topology = read_topology(host.cpus, "node:1 core:4 pu:2");
  const CorePlan plan = plan_cores(request(1, 1), host, topology);
  EXPECT_EQ(plan.cpus, (std::vector<int>{3, 5, 6}));
  EXPECT_EQ(plan.threads_per_rank, 3);
}

TEST_F(Cores, QuotaLimitsThreadsAndPinsNothing) {
  const HostResources host{.cpus = first_cpus(8), .cpu_quota = 2.5};
  const CorePlan plan = plan_cores(request(1, 1), host, read_topology(host.cpus, "core:8 pu:1"));
  EXPECT_EQ(plan.threads_per_rank, 3);
  EXPECT_TRUE(plan.cpus.empty());
  EXPECT_TRUE(has(plan.reason, "quota of 2.5 cores")) << plan.reason;
  EXPECT_TRUE(has(plan.reason, "not pinned")) << plan.reason;
}

TEST_F(Cores, MoreThreadsThanCpusAreCutWithAWord) {
  const HostResources host{.cpus = first_cpus(4)};
  const Topology topology = read_topology(host.cpus, "core:2 pu:2");
  CorePlan plan = plan_cores(request(1, 1, 64), host, topology);
  EXPECT_EQ(plan.threads_per_rank, 4);
  EXPECT_TRUE(plan.cpus.empty());
  EXPECT_TRUE(has(plan.reason, "4 threads per rank (64 asked for, this process may use 4 CPUs)"))
      << plan.reason;
  plan = plan_cores(request(3, 3, 1), host, topology);
  EXPECT_TRUE(plan.cpus.empty());
  EXPECT_TRUE(has(plan.reason, "3 threads of this node for 2 cores")) << plan.reason;
  // More ranks than cores: one thread each.
  EXPECT_EQ(plan_cores(request(1, 8), host, topology).threads_per_rank, 1);
}

TEST_F(Cores, NodesOfOneMachineLeaseDifferentCores) {
  const HostResources host{.cpus = first_cpus(4)};
  const Topology topology = read_topology(host.cpus, "core:4 pu:1");
  const CorePlan first = plan_cores(request(1, 2), host, topology);
  CorePlan second = plan_cores(request(1, 2), host, topology);
  EXPECT_EQ(first.cpus, (std::vector<int>{0, 1}));
  EXPECT_EQ(second.cpus, (std::vector<int>{2, 3}));
  const CorePlan third = plan_cores(request(1, 2), host, topology);
  EXPECT_TRUE(third.cpus.empty());
  EXPECT_EQ(third.threads_per_rank, 2);
  EXPECT_TRUE(has(third.reason, "hold 4 of the 4 cores in " + folder_)) << third.reason;
  second = {};
  EXPECT_EQ(plan_cores(request(1, 2), host, topology).cpus, (std::vector<int>{2, 3}));
}

TEST_F(Cores, ALeaseFolderThatCannotBeUsedPinsNothing) {
  const HostResources host{.cpus = first_cpus(2)};
  CoreRequest r = request(1, 1);
  r.lease_folder = "/proc/no/such/folder";
  const CorePlan plan = plan_cores(r, host, read_topology(host.cpus, "core:2 pu:1"));
  EXPECT_EQ(plan.threads_per_rank, 2);
  EXPECT_TRUE(plan.cpus.empty());
  EXPECT_TRUE(has(plan.reason, "cannot be leased in /proc/no/such/folder")) << plan.reason;
}

TEST_F(Cores, NamedCpusAreTakenAsTheyAre) {
  const HostResources host{.cpus = first_cpus(8)};
  const Topology topology = read_topology(host.cpus, "core:4 pu:2");
  const CorePlan plan = plan_cores(request(2, 2, 0, "1,4-6"), host, topology);
  EXPECT_EQ(plan.cpus, (std::vector<int>{1, 4, 5, 6}));
  EXPECT_EQ(plan.threads_per_rank, 2);
  EXPECT_TRUE(plan_cores(request(2, 2, 0, "none"), host, topology).cpus.empty());
}

TEST_F(Cores, ImpossibleCpusAreRefusedByName) {
  const HostResources host{.cpus = {0, 1}};
  const Topology topology = read_topology(host.cpus, "core:4 pu:1");
  const std::pair<const char*, const char*> cases[] = {
      {"2", "it lacks 2"},      {"0,0", "each once"},
      {"1-0", "such as 0-3,8"}, {"a", "such as 0-3,8"},
      {"0,", "such as"},        {"0-99999999", "such as"},
      {"-1", "such as 0-3,8"},  {"0", "at least 2 for 2 ranks of 1 thread each, found 1"},
  };
  for (const auto& [cpus, expected] : cases) {
    try {
      (void)plan_cores(request(2, 2, 0, cpus), host, topology);
      FAIL() << cpus << " accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), Code::kInvalidArgument);
      EXPECT_TRUE(has(e.what(), "PHALANX_CPUS")) << e.what();
      EXPECT_TRUE(has(e.what(), expected)) << e.what();
    }
  }
}

TEST_F(Cores, ThisMachineCanBeRead) {
  const HostResources host = host_resources();
  const Topology topology = read_topology(host.cpus);
  ASSERT_FALSE(topology.cores.empty());
  EXPECT_LE(topology.cores.size(), host.cpus.size());
  EXPECT_GE(plan_cores(request(1, 1), host, topology).threads_per_rank, 1);
}

TEST_F(Cores, AMachineThatCannotBeReadHasACoreForEachCpu) {
  const Topology topology = read_topology({0, 1, 2}, "no such machine");
  EXPECT_EQ(topology.cores.size(), 3u);
  EXPECT_TRUE(has(topology.note, "hwloc")) << topology.note;
}

}  // namespace
}  // namespace phalanx::apps
