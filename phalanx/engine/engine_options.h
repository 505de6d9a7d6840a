#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace phalanx::engine {

inline constexpr int64_t kMostDraftTokens = 16;

struct EngineOptions {
  int64_t vocab_size = 0;
  int64_t block_size = 128;
  int64_t blocks = 0;                  // of the KV cache
  int64_t max_sequence = 2560;         // maxSeqLen
  int64_t max_input_tokens = 2048;     // maxInputTokenLen
  int64_t max_prefill_tokens = 8192;   // maxPrefillTokens: prompt tokens in one step
  int64_t max_prefill_batch = 50;      // maxPrefillBatchSize: sequences in prefill in one step
  int64_t max_batch = 200;             // maxBatchSize: sequences running
  int64_t max_output_tokens = 512;     // maxIterTimes
  int64_t max_step_tokens = 0;         // of the ranks' buffers; >= max_batch; longer prompts are chunked
                                       // (StepLimits: max_tokens this)
  int64_t max_step_rows = 0;           // of the ranks' logits (StepLimits: max_rows); >= max_batch, or 0:
                                       // max_batch
  int64_t max_queue = 2000;            // waiting requests
  bool prefix_cache = true;            // sequences share the blocks of equal beginnings
  double decode_stretch = 1.6;         // how much longer a step may take for prompts beside running
                                       // sequences (PrefillPace); 0: as long as it takes
  double ageing_seconds = 15;          // a request that has waited so long counts as one priority higher,
                                       // after twice as long as two; 0: never
  int64_t draft_tokens = 0;            // speculation: at most that many guesses per sequence and step (at
                                       // most kMostDraftTokens), 0: none
  bool draft_model = false;            // guesses are the executor's draft model's (its step limits'
                                       // draft_sequences: draft_batch), not looked up
  int64_t draft_most = 4;              // tokens of the run that is looked up, at most and at least
  int64_t draft_least = 2;
  int64_t draft_batch = 16;            // no drafts while more sequences than this decode
  int64_t max_adapters = 0;            // LoRA adapters at once (StepLimits: max_adapters); 0: none
  std::vector<std::string> rank_places;  // of the ranks, for messages about adapters: "rank 2 (node A)"
  uint64_t generation = 1;
  bool recover = false;                // an executor that throws suspends the engine, not ends it
  double step_seconds = 600;           // longest wait for one step
  double idle_plan_seconds = 20;       // an idle plan keeps the links checked
};

// Throws Error(kInvalidArgument) naming every option that cannot be.
void check_options(const EngineOptions& options);

}  // namespace phalanx::engine
