#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "phalanx/engine/draft_order.h"
#include "phalanx/layers/memory.h"
#include "phalanx/models/model.h"

namespace phalanx::engine {

// Guesses tokens with a small model that lies whole on rank 0: what it computes needs no message, and
// the ranks get their plan when the guesses are in it. It takes the likeliest token every time; whether
// that is what the sampler takes, the step's own logits decide. So no guess changes an answer.
class Drafter {
 public:
  // `model` belongs to a group of one rank and is lent; its KV cache has the blocks of `limits`, its
  // steps hold limits.max_tokens tokens and limits.draft_sequences rows.
  Drafter(models::Model& model, const StepLimits& limits);
  // Computes what `order` says and writes the guesses into their places in `plan`, the buffer that
  // `view` was decoded from; the same, want after want, into `guesses` (limits.max_rows of them).
  // Throws Error(kDataLoss) for an order that does not fit the plan.
  void run(std::span<const std::byte> order, const StepPlanView& view, std::span<std::byte> plan,
           std::span<int32_t> guesses);
  // Bytes of the rows of logits, which are no part of the model's workspace.
  [[nodiscard]] static int64_t logits_bytes(int64_t draft_sequences, int64_t vocab_size);

 private:
  struct Guessing {
    size_t slice = 0;    // of the step plan
    int32_t place = 0;   // of its next guess, in the step plan's tokens
    int32_t left = 0;    // guesses still to make
    size_t out = 0;      // of its next guess, in `guesses`
  };
  void take(std::span<int32_t> tokens, std::span<int32_t> guesses);

  models::Model& model_;
  const StepLimits limits_;
  DraftOrderView order_;
  std::vector<std::byte> buffer_;
  layers::Memory logits_memory_;
  std::span<float> logits_;  // [draft_sequences, vocab]
  std::vector<Guessing> guessing_;
  // One token of each sequence that goes on guessing.
  std::vector<int32_t> tokens_, positions_, slots_, rows_;
  std::vector<ops::SequenceSlice> slices_;
};

}  // namespace phalanx::engine
