#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "phalanx/engine/request.h"
#include "phalanx/engine/sampler.h"

namespace phalanx::engine {

// One accepted request in the head: everything that a replay needs, and its place in the KV cache.
// Owned and changed by the engine thread; only cancel_requested is set by others.
//
// Invariant: the KV cache holds tokens [0, computed) in `blocks`; while running,
// computed < tokens.size(), and the last token is the newest accepted one.
struct Sequence {
  std::string id;
  uint32_t tag = 0;                 // number in order of admission
  SamplingParams params;
  uint64_t seed = 0;                // drawn at admission if the request had none
  int32_t priority = 5;
  int32_t level = 5;                // priority, less what it gained by waiting
  std::string client;
  uint64_t turn = 0;                // place among the waiting ones of its priority
  std::shared_ptr<EventSink> sink;
  std::atomic<bool> cancel_requested{false};

  std::vector<int32_t> tokens;      // prompt and accepted output; capacity for all of it
  int32_t prompt_count = 0;
  int32_t max_outputs = 0;
  std::optional<TokenCounts> counts;  // with a penalty

  int64_t submitted_ns = 0;
  int64_t first_token_ns = 0;       // 0: none yet
  int64_t queue_ns = 0;             // from submission to the first step

  std::vector<int32_t> blocks;      // capacity for the longest this can get
  uint64_t salt = 0;                // differs where equal tokens have other keys and values: the
                                    // number of its adapter, 0: none
  int32_t adapter = -1;             // slot of it, -1: none
  bool reuse_prefix = true;         // false: every position has to be computed
  int32_t cached_tokens = 0;        // of the prompt, found computed when it began first
  uint64_t place = 0;               // of the last published block in the pool
  int32_t published = 0;            // blocks
  bool begun = false;               // has been admitted before

  int32_t scored = 0;               // positions of the prompt whose logits gave prompt_scores
  std::vector<PromptLogprob> prompt_scores;

  int32_t computed = 0;
  int32_t planned = 0;              // tokens in the step being computed, drafts included
  std::vector<int32_t> draft;       // guesses after the last token, in the step being computed
  int32_t draft_limit = 0;          // follows how many were right
  int32_t followed = 0;             // the draft model's KV cache holds tokens [0, followed)
  int32_t following = 0;            // tokens that it computes in this step, guesses not counted
  int32_t guessed_until = 0;        // positions that it will have computed then, guesses included
  bool finished = false;            // its final event is made; leaves at the next collect

  [[nodiscard]] int32_t length() const { return static_cast<int32_t>(tokens.size()); }
  // Some tokens of the prompt still need their log-probability.
  [[nodiscard]] bool to_score() const {
    return params.prompt_logprobs >= 0 && scored < prompt_count - 1;
  }
  [[nodiscard]] int32_t outputs() const { return length() - prompt_count; }
};

}  // namespace phalanx::engine
