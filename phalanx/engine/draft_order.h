#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "phalanx/engine/step_plan.h"

namespace phalanx::engine {

// What the draft model computes before a step, from the head to rank 0 alone: a step plan of its own
// (the tokens that the draft model lacks; a row wherever guesses are wanted) and behind it one DraftWant
// per row. Both models keep a token in the same slot of the same block, each in its own KV cache.
struct DraftWant {
  int32_t sequence = 0;  // of the step plan; its last `count` tokens are to be guessed
  int32_t count = 0;
};

// Builds orders in one reused buffer.
class DraftOrderWriter {
 public:
  void begin(uint64_t generation, uint64_t step);
  // The draft model computes `tokens` at positions [context - tokens.size(), context) and, with
  // count > 0, goes on with that many guesses, which are the last tokens of the step plan's
  // `sequence`.
  void add(std::span<const int32_t> tokens, int32_t context, std::span<const int32_t> block_table,
           int32_t block_size, int32_t sequence, int32_t count);
  // Empty when there is nothing to compute. Valid until the next begin().
  [[nodiscard]] std::span<const std::byte> finish();

 private:
  StepPlanWriter plan_;
  std::vector<DraftWant> wants_;
  std::vector<std::byte> buffer_;
  bool any_ = false;
};

// Of an order under these limits (those of the step plan); 0 where there is no draft model.
[[nodiscard]] int64_t max_draft_order_bytes(const StepLimits& limits);

// Views into an order. Valid while the buffer is.
class DraftOrderView {
 public:
  // Checks everything, also against the decoded step plan that it belongs to. Throws Error(kDataLoss)
  // naming the field. `buffer` is the order without anything behind it, 4-aligned.
  void decode(std::span<const std::byte> buffer, const StepPlanView& plan, const StepLimits& limits);
  [[nodiscard]] const models::StepInputs& inputs() const { return view_.inputs(); }
  // In the order of the rows.
  [[nodiscard]] std::span<const DraftWant> wants() const { return wants_; }

 private:
  StepPlanView view_;
  std::span<const DraftWant> wants_;
};

}  // namespace phalanx::engine
