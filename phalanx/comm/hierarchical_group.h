#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "phalanx/base/clock.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/comm/bootstrap.h"
#include "phalanx/comm/exchange.h"
#include "phalanx/comm/group.h"
#include "phalanx/comm/shm/node_memory.h"
#include "phalanx/comm/shm/node_slots.h"
#include "phalanx/comm/topology.h"

namespace phalanx::comm {

// Shared memory within nodes, links between all ranks of different nodes. Any number of ranks per
// node. What crosses nodes crosses once per node, spread over the node's ranks, in one hop; then
// the node's ranks share it.
class HierarchicalGroup final : public Group, private Watch {
 public:
  // Forms the group; see form_group().
  HierarchicalGroup(const GroupOptions& options, int listener, int node_memory);
  ~HierarchicalGroup() override;

  [[nodiscard]] int rank() const override { return topology_.rank; }
  [[nodiscard]] int size() const override { return topology_.size(); }
  void all_gather(std::byte* matrix, int64_t rows, std::span<const int64_t> row_bytes) override;
  void gather(std::byte* matrix, int64_t rows, std::span<const int64_t> row_bytes,
              int root) override;
  void broadcast(std::span<std::byte> bytes, int root) override;
  void all_reduce(std::span<float> values) override;
  void barrier() override;
  void abort(const char* reason) noexcept override;
  [[nodiscard]] GroupStats stats() const override;

 private:
  struct Sibling {
    int rank;
    int local;
    UniqueFd process;
  };

  // Watch.
  [[nodiscard]] bool aborted() const override;
  void check(int awaited) override;
  void explain_loss() override;

  template <typename Body>
  void run(Operation operation, Body body);
  void end(const Fault& fault) noexcept;  // this group is dead, and everybody is told
  [[nodiscard]] uint64_t waited_ns() const;
  [[nodiscard]] bool ended(const Sibling& sibling) const;

  void join_node(int node_memory);
  void await_siblings(Deadline deadline);
  void self_test();
  void gather_blocks(std::span<const Region> blocks);  // by rank
  void reduce_by_owners(std::span<float> values);
  std::byte* scratch(int64_t bytes);

  GroupOptions options_;
  Topology topology_;
  bool even_ = false;                   // every node has the same number of ranks
  std::vector<int> column_;             // if even: the ranks with own local index, by node
  std::unique_ptr<NodeMemory> memory_;  // null when alone on the node
  std::unique_ptr<NodeSlots> slots_;
  std::unique_ptr<Exchange> exchange_;
  std::vector<Sibling> siblings_;  // in other processes of the node

  std::atomic<bool> dead_{false};
  mutable std::mutex mutex_;
  std::optional<Fault> fault_;  // guarded by mutex_

  Operation operation_ = Operation::kBarrier;
  uint64_t sequence_ = 0;
  double cap_seconds_ = 0;
  int64_t deadline_ns_ = 0;  // of the operation under way
  std::vector<Region> blocks_;
  std::vector<std::vector<Region>> streams_;  // by local index
  std::vector<std::byte> scratch_;
  uint64_t busy_ns_ = 0;
};

}  // namespace phalanx::comm
