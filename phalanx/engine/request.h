#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "phalanx/base/error.h"

namespace phalanx::engine {

// Which tokens one sequence may take next: a grammar, a budget for reasoning. Belongs to one sequence;
// called on the engine thread. It keeps its place while the sequence is preempted or recovered, since
// both keep the accepted tokens.
class TokenGuide {
 public:
  virtual ~TokenGuide() = default;
  // Bit i % 32 of word i / 32: token i may come next. Tokens beyond the last word may not. Empty: any
  // token may. Valid until accept(). May wait, by a deadline of its own, for what accept() started;
  // throws Error, which ends this request alone.
  [[nodiscard]] virtual std::span<const uint32_t> allowed() = 0;
  // `token` was accepted. Must not block: what is long is done elsewhere, while the next step runs.
  virtual void accept(int32_t token) = 0;
};

// What a client may ask of sampling. Defaults are "no effect"; the API fills in the model's
// generation_config.json before it submits. Formulas: sampler.h.
struct SamplingParams {
  float temperature = 1.0f;          // 0: greedy
  int32_t top_k = -1;                // -1: off
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;   // over prompt and output
  float presence_penalty = 0.0f;     // over output
  float frequency_penalty = 0.0f;    // over output
  std::optional<uint64_t> seed;      // drawn at admission if absent
  int32_t max_tokens = 16;           // output tokens, > 0
  int32_t min_tokens = 0;
  std::vector<int32_t> stop_token_ids;  // with the model's EOS ids already added unless ignore_eos
  int32_t logprobs = -1;             // -1: none; n: the chosen token's and the n best
  int32_t prompt_logprobs = -1;      // -1: none; n: of every prompt token, and the n best there
  std::vector<std::pair<int32_t, float>> logit_bias;  // added to the logits of these ids; each id once
  std::shared_ptr<TokenGuide> guide;  // of this sequence alone; null: any token may come
};

struct GenerateRequest {
  std::string id;                    // unique among running requests
  std::vector<int32_t> prompt;       // token ids, not empty
  SamplingParams sampling;
  int32_t priority = 5;              // 1 (first) to 5; a lower one waits for all higher ones, and rises as
                                     // it waits (EngineOptions::ageing_seconds)
  std::string adapter;               // name of a LoRA adapter (Engine::load_adapter); empty: the base
  std::string client;                // whose turn it counts as; clients of one priority take turns
};

enum class FinishReason { kNone, kStop, kLength, kCancelled, kError };

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0;
};

// What the model thought of one token of the prompt, given those before it.
struct PromptLogprob {
  int32_t token = 0;
  float logprob = 0;
  int32_t rank = 1;                   // 1: the most probable
  std::vector<TokenLogprob> top;      // best first
};

// One accepted token, or the end of a request.
struct GenerateEvent {
  int32_t token = -1;                 // -1: the event carries no token
  float logprob = 0;                  // if asked for
  std::vector<TokenLogprob> top;      // if asked for, best first
  FinishReason finish = FinishReason::kNone;
  int32_t stop_token = -1;            // with kStop: which id stopped it (also in `token`)
  std::optional<Error> error;         // with kError
  std::vector<PromptLogprob> prompt;  // with the first token, if asked for: of all but the first of the
                                      // prompt
  int32_t prompt_tokens = 0;          // usage so far
  int32_t output_tokens = 0;
  int32_t cached_tokens = 0;
  int64_t queue_ns = 0;               // from submission to the first step
};

// Where the events of one request go. Called on the engine thread; must not block. The event with
// finish != kNone is the last.
class EventSink {
 public:
  virtual ~EventSink() = default;
  virtual void on_event(GenerateEvent event) = 0;
};

enum class SubmitResult {
  kAccepted,
  kQueueFull,
  kPromptTooLong,   // more than max_input_tokens, max_sequence - 1, or than the KV cache can hold
  kBadToken,        // an id outside the vocabulary
  kBadParameter,    // an empty prompt, or a sampling value outside its range
  kDuplicateId,
  kUnknownAdapter,  // no adapter of that name may be used (any more)
  kStopped,         // draining, stopped or failed
};

}  // namespace phalanx::engine
