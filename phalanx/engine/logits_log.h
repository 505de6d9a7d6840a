#pragma once

#include <cstdint>
#include <set>
#include <span>
#include <string>

#include "phalanx/engine/step_plan.h"

namespace phalanx::engine {

// Writes the logits of every sampled row to `folder`/seq<tag>.f32: raw f32 rows of one request in
// order of position. Requests submitted in the same order to two runs have the same tags, so files
// of runs with other rank counts or batches can be compared with cmp.
class LogitsLog {
 public:
  // Makes the folder. Throws Error naming it.
  explicit LogitsLog(std::string folder, int64_t vocab_size);
  // logits: [num_rows, vocab_size] of the plan. A file left by an earlier run is replaced.
  void append(const StepPlanView& plan, const float* logits);

 private:
  std::string folder_;
  int64_t vocab_size_;
  std::set<uint32_t> begun_;
};

}  // namespace phalanx::engine
