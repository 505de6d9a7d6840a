#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "apps/adapters.h"
#include "apps/config.h"
#include "apps/cores.h"
#include "apps/host.h"
#include "apps/rank_supervisor.h"
#include "phalanx/cluster/control.h"
#include "phalanx/engine/step_channel.h"
#include "phalanx/models/model.h"

namespace phalanx::apps {

// The draft model of speculation, whole on rank 0.
struct DraftPlan {
  models::ModelInfo info;
  models::MemoryNeed need;  // with the rows of logits; in `needs` too
  int64_t sequences = 0;    // that draft in one step, at most
};

// Everything a start decides before any socket opens, the same on every node but for `local`.
struct NodePlan {
  models::ModelInfo info;
  cluster::Seating seats;                      // who computes which rank
  std::vector<double> weights;                 // by rank
  std::vector<models::RankLayout> layout;      // by rank
  int64_t max_step_tokens = 0;
  int64_t max_step_rows = 0;
  std::vector<int> local_ranks;                // none on a spare
  int64_t kv_blocks_wanted = 0;                // more than this could never be used
  std::vector<models::MemoryNeed> needs;       // by local rank
  std::optional<DraftPlan> draft;              // on the node of rank 0
  int64_t kv_bytes_per_rank = 0;               // what remains for each local rank's KV cache
  int threads_per_rank = 1;
  CorePlan cores;                              // of all local ranks
  AdapterPlan adapters;
};

// Reads the model's config.json, verifies the weight files' headers, cuts the model as the rank table
// has it, and divides the memory. Where weights are "auto" they are decided when all nodes are there:
// until then the cut is an equal one and memory is not held against it. Throws Error with all problems;
// opens no socket.
[[nodiscard]] NodePlan plan_node(const NodeConfig& config, const HostResources& host);

// The same model, cut anew. Throws Error(kResourceExhausted) when memory does not suffice.
[[nodiscard]] NodePlan replan_node(const NodeConfig& config, const HostResources& host,
                                   const NodePlan& before, const cluster::Seating& seats);

// Which node with these offers (by server) has too little memory for its ranks, and why. Of nodes on
// this machine, which share its memory, the ranks are counted together.
[[nodiscard]] std::optional<cluster::Misfit> find_misfit(
    const NodeConfig& config, const NodePlan& plan, const cluster::Seating& seats,
    const std::vector<cluster::NodeOffer>& offers);

// A table for people: which rank has which heads, rows and vocabulary.
[[nodiscard]] std::string layout_table(const NodeConfig& config, const NodePlan& plan);

// How weights and KV cache are stored, and what the draft model takes, one line each.
[[nodiscard]] std::vector<std::string> format_report(const NodeConfig& config, const NodePlan& plan);

// This node's part of an instance: its rank processes, as the control plane drives them. Each
// generation has new ones. The packed weights of every rank stay here: a rank's successor maps them
// and reads nothing.
class Node final : public cluster::NodeActions {
 public:
  struct Hooks {
    // The whole instance is ready. On the master `blocks` are the agreed KV blocks.
    std::function<void()> serve;
    // The instance is ready, without ranks of this node.
    std::function<void()> stand_by = [] {};
    // A local rank of this generation died or failed while the instance ran. definite: its process
    // died, so that this is no echo of another's fault.
    std::function<void(uint64_t generation, const Error&, bool definite)> fault;
  };
  Node(const NodeConfig& config, const NodePlan& plan, Hooks hooks);
  ~Node() override;

  std::vector<cluster::RankEndpoint> prepare(const cluster::Generation& generation) override;
  void connect(const std::vector<comm::Member>& members) override;
  cluster::LoadResult load() override;
  void allocate(int64_t kv_blocks) override;
  void serve() override;
  void stand_by() override;
  [[nodiscard]] std::vector<cluster::RankReport> reports() override;
  void abort(const std::string& reason) noexcept override;

  // Master only, after allocate(): of this generation.
  [[nodiscard]] std::shared_ptr<engine::StepChannelHead> channel() const;
  [[nodiscard]] int64_t kv_blocks() const { return kv_blocks_; }
  [[nodiscard]] uint64_t generation() const { return number_; }
  // Of the present generation.
  [[nodiscard]] std::shared_ptr<const NodePlan> plan() const;
  // Waits for the local ranks to leave their loops (after a stop plan), then kills.
  bool wait_ranks_stopped(Deadline deadline);
  [[nodiscard]] cluster::NodeOffer offer() const;

 private:
  [[nodiscard]] UniqueFd open_listener(const std::string& device_ip,
                                       cluster::RankEndpoint& endpoint);
  void show_progress(const std::atomic<bool>& done) const;
  // Memory for a rank's weights: what its predecessor left, if that is whole and of the same cut.
  [[nodiscard]] int arena_for(int rank, const std::vector<double>& shares, ops::Isa isa);
  // Ends the ranks of the generation before, their links and shared memory.
  void end_ranks();

  static constexpr int kDraftArena = -1;
  struct Arena {
    UniqueFd memory;
    ops::Isa isa = ops::Isa::kRef;
    std::vector<double> weights;  // of the cut
  };

  const NodeConfig& config_;
  const HostResources host_;  // before anything was loaded
  Hooks hooks_;
  cluster::Generation generation_;
  std::atomic<uint64_t> number_{0};  // of generation_, for other threads
  std::map<int, Arena> arenas_;      // by rank; kDraftArena: of the draft model
  engine::StepLimits channel_limits_;
  UniqueFd node_memory_;
  UniqueFd step_channel_;
  std::vector<UniqueFd> listeners_;
  mutable std::mutex mutex_;  // guards the pointers below against reports() and abort()
  std::shared_ptr<const NodePlan> plan_;
  std::shared_ptr<engine::StepChannelHead> channel_;
  std::shared_ptr<RankSupervisor> ranks_;
  int64_t kv_blocks_ = 0;
};

// What must agree between the nodes of an instance.
[[nodiscard]] cluster::JoinFacts join_facts(const NodeConfig& config, const NodePlan& plan);

}  // namespace phalanx::apps
