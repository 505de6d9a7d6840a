#pragma once

// The inside of a Coordinator. One mutex guards everything; it is never held while a NodeActions
// method or the loss callback runs. Threads: the callers of start() and stop(); gRPC's, which only
// record what arrived; a ticker (heartbeats, lost nodes, deadlines, notices); a watcher (abort()
// and the loss callback).

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "phalanx/cluster/control.h"
#include "phalanx/cluster/control_server.h"

namespace phalanx::cluster {

// The text of a fault with its node's name before it, unless it begins with that name already.
[[nodiscard]] std::string named(const std::string& node, const std::string& text);
[[nodiscard]] double seconds_since(Clock::time_point when);

struct Coordinator::State final : ControlServer::Handler {
  enum class Stage { kJoining, kPhases, kServing, kEnding, kClosed };
  struct Node {
    std::string name;            // its address
    NodeState state = NodeState::kAbsent;
    StreamId stream = 0;         // 0: none
    bool done = false;           // with the current phase
    Clock::time_point since;     // of the present state of being there or missing
    Clock::time_point contact;
    std::string verdict;         // dead, stuck, cut off or away, while it is lost
    std::string reason;          // last refusal or loss
    NodeOffer offer;
    std::vector<RankReport> ranks;
    std::vector<RankEndpoint> endpoints;
    LoadResult load;
    std::string unfit;           // why it may not stand in for another, until it joins again
    bool untold = false;         // the instance stops, and it was out of reach when it was told
  };
  struct Failure {
    int server = 0;
    Code code = Code::kUnknown;
    std::string text;
    std::vector<std::string> also;  // what others reported while it settled
    Clock::time_point settles;      // until then a more telling cause may replace it
    bool symptom = false;           // may be the echo of another node's death
    bool recoverable = false;       // the next generation may do better
    [[nodiscard]] std::string full_text() const;
  };
  struct Pending {                  // a stream that has not joined
    std::string peer;
    Clock::time_point since;
    bool refused = false;
  };
  struct Phase {
    std::string name;
    NodeState state = NodeState::kPreparing;
    bool local_first = false;       // the others are told when the master is done
  };

  State(const ControlOptions& options, NodeActions& local);
  ~State() override;

  // This generation was lost before it served; the next one may do better.
  struct Lost {
    std::string text;
  };

  void start();
  // Ends what is left of the last generation: nothing of it is waited for or answered any more.
  void begin_generation(std::unique_lock<std::mutex>& lock);
  // One generation, in order. Throws Lost, or Error when all is over.
  void form(std::unique_lock<std::mutex>& lock);
  void wait_for_all(std::unique_lock<std::mutex>& lock);
  // coordinator_seats.cc. With the lock.
  [[nodiscard]] bool seated(int server) const { return is_seated(generation.seats, server); }
  [[nodiscard]] bool here(int server) const {
    return server == options.own_server || nodes[static_cast<size_t>(server)].stream != 0;
  }
  // The classes of the nodes in this generation, where they differ: a line in the log, once.
  void tell_classes(const std::vector<std::string>& names, const std::vector<NodeOffer>& offers);
  // Weights that the table leaves to measurement, before the first generation.
  void decide_seats(std::unique_lock<std::mutex>& lock);
  // Spares that came before the numeric class was known and lack it are refused now.
  void refuse_other_classes();
  [[nodiscard]] std::optional<Misfit> misfit(const Seating& seats) const;
  // The spare that can take over the ranks of a lost server now; -1: none.
  int stand_in_for(int server);
  // The lost servers that have been away long enough, once a spare is here for them.
  bool take_over_due();
  void take_over();
  // When the next lost server has been away long enough; give_up if none is waited for.
  [[nodiscard]] Clock::time_point next_take_over() const;
  // Goes on with those that are here. False, with a line in the log, where they cannot.
  bool shrink();
  // Whether the failed generation, which did not serve, is followed by another: if it may do
  // better, or if the seats that served last can be taken again.
  bool try_again();
  // What the server took over goes back to those whose it was. With more ranks than served last:
  // all.
  void withdraw(int server);
  [[nodiscard]] bool newcomer(int server) const {
    return seated(server) && !is_seated(proven_seats, server);
  }
  // After shrink(): the seating of all ranks, lost nodes' places filled by spares, if those that
  // are here can have it.
  std::optional<Seating> full_again();
  // How long a node must be here for that. Each failed try doubles it: a node that comes and goes must
  // not stop the others for long.
  [[nodiscard]] double growth_wait() const;
  // While fewer ranks serve: ends the generation once a full one has been possible for long enough.
  // A line to log, or nothing.
  std::string grow_when_due();
  // Why a node that has ranks in the table has none now; empty for a spare of the table.
  [[nodiscard]] std::string why_without_ranks(int server) const;
  void send_standby(int server);
  void run_phase(std::unique_lock<std::mutex>& lock, const Phase& phase,
                 control::v1::FromMaster message, const std::function<void()>& action);
  void throw_if_over(std::unique_lock<std::mutex>& lock);
  std::vector<comm::Member> members() const;

  // Ends the instance: sends `message`, waits for the streams to end, cancels the rest.
  void end(std::unique_lock<std::mutex>& lock, const control::v1::FromMaster& message,
           Deadline deadline);

  // What arrives. Called from gRPC's threads without the lock.
  void on_open(StreamId stream, const std::string& peer) override;
  void on_message(StreamId stream, const control::v1::FromNode& message) override;
  void on_end(StreamId stream) override;
  // With the lock. join() and handle() return a line to log, or nothing.
  std::string join(StreamId stream, const control::v1::FromNode& message);
  std::string handle(int server, const control::v1::FromNode& message);
  std::string refusal(const control::v1::FromNode& message, Code& code);
  void phase_done(int server, const std::string& phase);
  // The node's stream ended or fell silent. Returns a line to log.
  std::string lose(int server, const std::string& verdict, const std::string& why);
  // The instance failed on `server`. The first stands, unless it is a symptom and the cause shows
  // before it settles.
  void fault(int server, Code code, const std::string& text, bool symptom);
  [[nodiscard]] bool of_present_generation(const control::v1::FromNode& message) const;
  void send_all(control::v1::FromMaster message, bool droppable = false);
  void send_seated(control::v1::FromMaster message);

  void tick();
  void watch();
  // Who is there and for whom we wait; with the lock.
  std::string notice() const;
  std::string name_of(int server) const;
  int server_of(StreamId stream) const;  // -1: none

  const ControlOptions options;
  const JoinFacts facts;
  NodeActions& local;

  mutable std::mutex mutex;
  std::condition_variable cv;
  Stage stage = Stage::kJoining;
  bool waiting = false;              // start() waits for nodes: notices are due
  std::vector<Node> nodes;           // by server
  std::map<StreamId, Pending> pending;
  std::string phase;                 // being run, empty in between
  std::optional<Clock::time_point> phase_deadline;
  Clock::time_point phase_since, next_notice;
  Generation generation;             // the present one; its number is 0 before the first
  Seating proven_seats;              // of the generation that served last, or was decided first
  Seating full_seats;                // the same, of the last one with all ranks
  std::string told_classes;          // by tell_classes()
  int attempts = 0;                  // in a row to serve with others than proven_seats
  int growths_failed = 0;            // in a row
  Clock::time_point give_up;         // start() ends by then unless all are there
  std::optional<Failure> failure;    // of this generation
  std::optional<std::string> abort_reason;  // the watcher calls abort() once in a generation
  bool abort_called = false, aborting = false;
  std::string stop_reason;
  std::function<void(const std::string&, const Error&)> callback;
  bool quit = false;

  ControlServer* server = nullptr;   // = server_owner; not used once stage is kClosed
  std::unique_ptr<ControlServer> server_owner;
  std::thread ticker, watcher;
};

}  // namespace phalanx::cluster
