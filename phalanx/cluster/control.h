#pragma once

// Life-cycle of an instance over gRPC: join, prepare, connect, load, allocate, serve, drain, stop,
// heartbeat. Nothing of a step travels here. gRPC and protobuf stay in .cc files.
//
// The master runs a Coordinator, every other node a Participant; both drive a NodeActions, in the
// same order on every node:
//   prepare (ranks started, data listeners open) -> connect (group formed, self-test passed)
//   -> load (weights packed) -> allocate (KV cache of the smallest node's size) -> serve.
//
// One run through these phases makes a generation: (random incarnation of the master, number). When
// it is lost (a rank or node died, a link broke) every node aborts its data plane and keeps its
// weights; the master waits for whoever is missing and runs the phases again with the next number.
// Answers and faults carry their generation; those of another one are dropped.
//
// Which server has which ranks is decided for each generation (seating.h). Nodes without ranks are
// spares: those that the table names, and lost ones that return when another has their ranks. They
// are connected, take part in no phase, and take over the ranks of a node that stays away.

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "phalanx/base/clock.h"
#include "phalanx/base/error.h"
#include "phalanx/cluster/rank_table.h"
#include "phalanx/cluster/seating.h"
#include "phalanx/comm/bootstrap.h"

namespace phalanx::net {
class TlsMaterial;
}

namespace phalanx::cluster {

inline constexpr int kControlVersion = 3;
// Stands in place of a numeric class where every node computes in the best one it has.
inline constexpr const char* kMixedClasses = "mixed";

enum class NodeState { kAbsent, kJoined, kPreparing, kConnecting, kLoading, kAllocating, kReady,
                       kServing, kDraining, kStopped, kLost, kSpare };
[[nodiscard]] std::string_view node_state_name(NodeState state);

// What must agree between nodes, compared name by name at the join; a mismatch is refused on both
// sides with the same two-column table. E.g. {"wire_version","1"}, {"rank table","<digest>"}.
using JoinFacts = std::vector<std::pair<std::string, std::string>>;

// What may differ and is reported to the master.
struct NodeOffer {
  std::string build;
  std::vector<std::string> numeric_classes;  // supported, weakest first
  int64_t memory_bytes = 0;
  int cores = 0;
  double bytes_per_second = 0;  // read from memory by all its cores; 0: not measured
};

// Two-phase generation data, made by the master.
struct Generation {
  uint64_t incarnation = 0;   // random, of the master
  uint64_t number = 0;        // rises within an incarnation; the first is 1
  std::string numeric_class;  // best one common to all nodes, or kMixedClasses
  comm::Token token{};
  Seating seats;              // who computes what
};

struct RankEndpoint {
  int rank = 0;
  std::string address;
  uint16_t port = 0;
};

// One rank as its node reports it (progress page), in heartbeats.
struct RankReport {
  int rank = 0;
  int pid = 0;
  std::string state;                          // "loading", "serving", ...
  std::map<std::string, uint64_t> counters;   // steps_done, compute_ns, wait_ns, bytes_read, ...
};

struct LoadResult {
  int64_t kv_blocks = 0;      // this node's ranks can hold, the smallest of them
  int64_t bytes_read = 0;
};

// What the control plane asks of the node process. prepare() to serve() are called by the thread
// that called Coordinator::start() or Participant::run(), one at a time, in that order, each at
// most once in a generation; a throw ends that generation on every node. prepare() also ends what
// the generation before left behind. reports() comes from other threads at any time and must return
// promptly (heartbeats wait for it). abort() comes from a thread of its own, never during
// prepare() of a generation it does not mean. No lock is held during any call.
class NodeActions {
 public:
  virtual ~NodeActions() = default;
  virtual std::vector<RankEndpoint> prepare(const Generation& generation) = 0;
  virtual void connect(const std::vector<comm::Member>& members) = 0;
  virtual LoadResult load() = 0;
  virtual void allocate(int64_t kv_blocks) = 0;
  // The whole instance is ready: print the success line, open HTTP (master). The master's is called
  // first, the others' when it has returned.
  virtual void serve() = 0;
  // The instance serves and this node has no ranks in it: what it may still hold of an earlier
  // generation ends. By the thread of prepare(), any number of times.
  virtual void stand_by() {}
  [[nodiscard]] virtual std::vector<RankReport> reports() = 0;
  // The instance failed, here or elsewhere, or is stopped while one of the calls above runs: wake
  // everything that waits on the data plane; a running call must then end soon. At most once in a
  // generation, never before its prepare(), never for an orderly stop while serving. Comes before
  // run() throws and before on_loss() is told.
  virtual void abort(const std::string& reason) noexcept = 0;
};

struct ControlOptions {
  RankTable table;
  int own_server = 0;
  uint16_t port = 1120;                 // multiNodesInferPort, on the master's address
  // Mutual TLS 1.3: this node's certificate, and how others' are judged. Null: in the clear.
  std::shared_ptr<const net::TlsMaterial> tls;
  // What `tls` is by now: new connections use it, within seconds. From any thread. Empty: it stays.
  std::function<std::shared_ptr<const net::TlsMaterial>()> renewed_tls;
  JoinFacts facts;
  NodeOffer offer;
  // Every node computes in its best numeric class, whatever the others have: results may differ
  // from those of any one class. Else the best common one, and nodes that lack it are refused
  // later.
  bool mixed_classes = false;
  double join_seconds = 0;              // longest wait for all nodes; 0: for ever, with a line
  bool recover = false;                 // form a new generation after a loss (the master's counts)
  double recovery_seconds = 300;        // longest time from a loss to serving again, and longest
                                        // wait of a slave for its master's return
  // The master's count. How long a lost node may stay away before a spare takes over its ranks; and
  // whether, when recovery_seconds are over, those that are there go on over fewer ranks.
  double spare_seconds = 10;
  bool shrink = false;
  // Why the nodes with these offers (by server) cannot hold their ranks, or nothing; empty: they
  // can. Prompt and without calls of this room: it is asked with the lock held.
  std::function<std::optional<Misfit>(const Seating& seats, const std::vector<NodeOffer>& offers)>
      misfit;
  double phase_seconds = 3600;          // longest prepare, connect, load, allocate
  // Clocks of two nodes may differ by so much (certificates and logs depend on them); 0: any.
  double clock_seconds = 60;
  std::function<int64_t()> unix_ms;     // this node's clock; empty: the system's
  double notice_seconds = 5;            // between lines that say for whom we wait
  double heartbeat_seconds = 0.5;
  double lost_seconds = 2.5;            // without a heartbeat: lost
};

struct NodeView {
  int server = 0;
  std::string address;
  NodeState state = NodeState::kAbsent;
  double last_contact_seconds = -1;
  std::string verdict;                  // of a lost node: dead, stuck, cut off, or away (it left)
  std::string last_reason;
  NodeOffer offer;
  std::vector<RankReport> ranks;
  bool spare = false;                   // has no ranks in the present generation
};

// The master's end. Also drives the master's own NodeActions.
class Coordinator {
 public:
  // Opens the control port at once (not for a single-server table). Throws Error(kUnavailable).
  Coordinator(const ControlOptions& options, NodeActions& local);
  ~Coordinator();
  // Waits for all nodes, then runs the phases on all of them. Returns when every node has
  // confirmed serve(). Throws Error naming node and phase, after telling every node; kCancelled
  // after stop(). With `recover` a node or rank lost on the way is waited for, and after a loss
  // that on_loss() told, start() is called again and forms the next generation: with a spare in the
  // place of a node that stays away, or with fewer ranks (`shrink`). Spares are not waited for.
  void start();
  // Called once in a generation, from a thread of its own, when the instance is lost after start()
  // returned: a node's stream ended, its heartbeats stopped, or a rank died. All nodes have been
  // told to abort by then and wait for start(), fail() or stop(). The callback must return soon
  // and must not destroy this object. A loss that may be an echo (kUnavailable, kAborted, ...) is
  // told after 0.3 s, in which a more telling one replaces it. Kept if the callback is set later
  // than the loss.
  void on_loss(std::function<void(const std::string& node, const Error& error)> callback);
  // Reports a fault of the master's own node (a dead rank) in that generation: as if a node had
  // reported it. definite: it is no echo of another node's fault.
  void report_local_fault(uint64_t generation, const Error& error, bool definite);
  // Tells every node to stop, waits for their goodbye until the deadline, and two lost_seconds more
  // for nodes that are silent or cut off, to tell them. From any thread, also during start(). After
  // it, or fail(), losses are no longer told.
  void stop(const std::string& reason, Deadline deadline);
  // Tells every node that the instance failed (they exit non-zero).
  void fail(const Error& error, Deadline deadline);
  [[nodiscard]] std::vector<NodeView> nodes() const;
  // Of the present generation; the table's before the first.
  [[nodiscard]] Seating seats() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// A slave's end.
class Participant {
 public:
  Participant(const ControlOptions& options, NodeActions& local);
  ~Participant();
  // Joins (retrying while the master is unreachable, printing why, bounded by join_seconds),
  // follows the phases, then stays until the master says stop. Returns after an orderly stop or
  // leave(); throws Error when refused, when the instance failed (the same text on every node), or
  // when the master was lost. A master lost before prepare() is waited for again; one lost later
  // for recovery_seconds, if its welcome said that it recovers. Once.
  void run();
  // From any thread (signal handling): leave in an orderly way.
  void leave(const std::string& reason);
  // A rank of this node died in that generation: tells the master. Where nothing is recovered,
  // run() then throws the master's verdict (this error if none comes within 5 s).
  void report_local_fault(uint64_t generation, const Error& error, bool definite);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace phalanx::cluster
