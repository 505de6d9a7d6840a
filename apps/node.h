#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "apps/config.h"
#include "apps/cores.h"
#include "apps/host.h"
#include "apps/rank_supervisor.h"
#include "phalanx/cluster/control.h"
#include "phalanx/engine/step_channel.h"
#include "phalanx/models/model.h"

namespace phalanx::apps {

// Everything a start decides before any socket opens, the same on every node but for `local`.
struct NodePlan {
  models::ModelInfo info;
  std::vector<double> weights;                 // by rank
  std::vector<models::RankLayout> layout;      // by rank
  int64_t max_step_tokens = 0;
  int64_t max_step_rows = 0;
  std::vector<int> local_ranks;
  int64_t kv_blocks_wanted = 0;                // more than this could never be used
  std::vector<models::MemoryNeed> needs;       // by local rank
  int64_t kv_bytes_per_rank = 0;               // what remains for each local rank's KV cache
  int threads_per_rank = 1;
  CorePlan cores;                              // of all local ranks
};

// Reads the model's config.json, verifies the weight files' headers, cuts the model and divides the
// memory. Throws Error with all problems; opens no socket.
[[nodiscard]] NodePlan plan_node(const NodeConfig& config, const HostResources& host);

// A table for people: which rank has which heads, rows and vocabulary.
[[nodiscard]] std::string layout_table(const NodeConfig& config, const NodePlan& plan);

// This node's part of an instance: its rank processes, as the control plane drives them.
class Node final : public cluster::NodeActions {
 public:
  struct Hooks {
    // The whole instance is ready. On the master `blocks` are the agreed KV blocks.
    std::function<void()> serve;
    // A local rank died or failed while the instance ran.
    std::function<void(const Error&)> fault;
  };
  Node(const NodeConfig& config, const NodePlan& plan, Hooks hooks);
  ~Node() override;

  std::vector<cluster::RankEndpoint> prepare(const cluster::Generation& generation) override;
  void connect(const std::vector<comm::Member>& members) override;
  cluster::LoadResult load() override;
  void allocate(int64_t kv_blocks) override;
  void serve() override;
  [[nodiscard]] std::vector<cluster::RankReport> reports() override;
  void abort(const std::string& reason) noexcept override;

  // Master only, after allocate().
  [[nodiscard]] engine::StepChannelHead& channel();
  [[nodiscard]] int64_t kv_blocks() const { return kv_blocks_; }
  [[nodiscard]] uint64_t generation() const { return generation_.number; }
  // Waits for the local ranks to leave their loops (after a stop plan), then kills.
  bool wait_ranks_stopped(Deadline deadline);
  [[nodiscard]] cluster::NodeOffer offer() const;

 private:
  [[nodiscard]] UniqueFd open_listener(const cluster::Device& device, cluster::RankEndpoint& endpoint);
  void show_progress(const std::atomic<bool>& done) const;

  const NodeConfig& config_;
  const NodePlan& plan_;
  Hooks hooks_;
  cluster::Generation generation_;
  engine::StepLimits channel_limits_;
  UniqueFd node_memory_;
  UniqueFd step_channel_;
  std::vector<UniqueFd> listeners_;
  std::unique_ptr<engine::StepChannelHead> channel_;
  mutable std::mutex mutex_;  // guards the pointer below against reports() and abort()
  std::shared_ptr<RankSupervisor> ranks_;
  int64_t kv_blocks_ = 0;
};

// What must agree between the nodes of an instance.
[[nodiscard]] cluster::JoinFacts join_facts(const NodeConfig& config, const NodePlan& plan);

}  // namespace phalanx::apps
