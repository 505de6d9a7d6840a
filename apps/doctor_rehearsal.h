#pragma once

// One decode step without a model: every rank multiplies as many bytes of (meaningless) weights as its
// shard has, layer by layer, and gathers as much as the model would, over the data plane's own groups.
// So what meetings of ranks cost, and ranks that outnumber the cores, is measured, not estimated.

#include <cstdint>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "apps/doctor_node.h"
#include "phalanx/comm/bootstrap.h"

namespace phalanx::apps {

// What one rank does for one token between two gathers.
struct RehearsalPart {
  int64_t inputs = 0;                // of the linear layer
  int64_t bytes = 0;                 // of weights and KV cache that it reads
  std::vector<int64_t> row_bytes;    // gathered afterwards, by rank; empty: nothing
};

struct RehearsalWork {
  int64_t layers = 0;
  int64_t hidden = 0;
  std::vector<RehearsalPart> parts;  // of a layer
  RehearsalPart head;                // gathered by rank 0
};

struct RehearsalResult {
  int steps = 0;
  double step_s = 0;     // median
  double compute_s = 0;  // of it outside collectives, the mean
};

[[nodiscard]] nlohmann::json to_json(const RehearsalWork& work);
// From another node: sizes are bounded. Throws Error(kInvalidArgument).
[[nodiscard]] RehearsalWork rehearsal_work_from_json(const nlohmann::json& j);

// The ranks of one node in one rehearsal, each a thread with the compute threads that a start would
// give it.
class Rehearsal {
 public:
  struct Port {
    int listener = -1;
    uint16_t number = 0;
  };
  // `ranks` of this node out of `total`, the first ones of the table. `data`: listeners that are lent to
  // it; where there are too few, it opens its own. Throws Error when a port, memory or cores are
  // missing.
  Rehearsal(const DoctorOptions& options, std::vector<int> ranks, int total,
            const std::vector<Port>& data);
  ~Rehearsal();
  // By rank of this node.
  [[nodiscard]] const std::vector<uint16_t>& ports() const;
  // Runs steps for about `seconds`, at least three; ranks of all nodes call it at the same time. works
  // and results by rank of this node. Throws Error of the first rank that failed.
  std::vector<RehearsalResult> run(const std::vector<comm::Member>& members, const comm::Token& token,
                                   const std::vector<RehearsalWork>& works, double seconds);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace phalanx::apps
