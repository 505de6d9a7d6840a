#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "apps/config.h"
#include "apps/node.h"
#include "phalanx/cluster/control.h"
#include "phalanx/engine/engine.h"

namespace phalanx::apps {

// What the master offers to those who use the instance: HTTP (serve) or a list of prompts (run).
// Made by the master once every rank is ready.
class Head {
 public:
  virtual ~Head() = default;
  // The instance answers from now on; returns at once.
  virtual void open(engine::Engine& engine) = 0;
  // No new work; running requests end by the deadline or are cancelled.
  virtual void drain(Deadline deadline) = 0;
  // The instance failed: every running request gets the error.
  virtual void fail(const Error& error) = 0;
};

struct InstanceView {
  bool serving = false;
  bool draining = false;
  std::optional<Error> failure;
  std::optional<Error> recovering;    // from this; requests wait
  std::vector<std::string> lost;      // addresses of lost nodes
  std::vector<std::string> spares;    // addresses of nodes that are here and have no ranks
  std::vector<cluster::NodeView> nodes;
};

// One node of an instance from start to end, master or slave. Blocks SIGINT and SIGTERM for the
// whole process at construction (do that before any thread exists) and treats them as stop().
class Instance {
 public:
  Instance(const NodeConfig& config, const NodePlan& plan);
  ~Instance();

  // Master only; null on slaves. Lives until the end of run().
  void set_head(std::unique_ptr<Head> head);
  // What the certificate between nodes is by now (cluster::ControlOptions); outlives run().
  void set_renewed_tls(std::function<std::shared_ptr<const net::TlsMaterial>()> renewed);
  // Every node computes in its best numeric class (cluster::ControlOptions); else in the best common
  // one. Before run(); all nodes must agree.
  void set_mixed_classes(bool mixed);
  // Printed on stdout by every node when the whole instance serves; empty: nothing.
  void set_success_line(std::string line);

  // Waits for all nodes, loads, serves, until stop() or a fault. With config.recover a lost rank or
  // node is waited for, a new generation formed and what runs is computed again, so that a fault
  // ends it only when that did not succeed. Returns the exit status: 0 after an orderly stop, 1
  // after a fault (already logged).
  int run();
  // From any thread.
  void stop(const std::string& reason);
  [[nodiscard]] InstanceView view() const;
  // Ranks, layout, states and counters as JSON text, for /v1/status and the ledger.
  [[nodiscard]] std::string status_json() const;
  [[nodiscard]] bool is_master() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace phalanx::apps
