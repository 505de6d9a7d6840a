#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "apps/rank_spec.h"
#include "phalanx/base/error.h"
#include "phalanx/base/clock.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/engine/rank_page.h"

namespace phalanx::apps {

// What one rank process is given. The descriptors stay the caller's.
struct RankStart {
  RankSpec spec;
  int listener = -1;
  int node_memory = -1;
  int step_channel = -1;
  int arena = -1;
  int draft_arena = -1;
};

// The rank processes of one node: starts them by exec, speaks with them, notices the end of any by
// its pidfd. One thread of its own, which also spawns them.
class RankSupervisor {
 public:
  // on_fault: from the supervisor's thread, when a rank ends or reports an error outside a call().
  // The other local ranks have been told to abort by then. `node` begins every error. definite: the
  // process was killed or is stuck, so that this is no echo of another rank's fault. At most twice:
  // an echo may come before its cause.
  using OnFault = std::function<void(const Error&, bool definite)>;
  // stuck_seconds: a rank without CPU time for so long is at fault; 0: never.
  RankSupervisor(std::string node, double stuck_seconds, OnFault on_fault);
  ~RankSupervisor();  // end()
  // Kills what still runs and reaps everything; on_fault does not run or come after it. Not from
  // on_fault. Once; then only views() may be called.
  void end();

  // Starts all ranks and waits until each has answered. Throws Error naming the rank.
  void start(const std::vector<RankStart>& ranks, Deadline deadline);
  // Sends one order to all ranks and collects their answers, by place. Throws the first rank's
  // error, after telling the others to abort.
  std::vector<nlohmann::json> call(const nlohmann::json& order, const std::string& event,
                                   Deadline deadline);
  void abort(const std::string& reason) noexcept;
  // After a stop plan was sent: waits for all to end by themselves, then kills. True if all ended
  // with status 0 in time.
  bool wait_stopped(Deadline deadline);

  struct View {
    int rank = 0;
    int pid = 0;
    std::string state;
    const engine::RankPage* page = nullptr;
  };
  [[nodiscard]] std::vector<View> views() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace phalanx::apps
