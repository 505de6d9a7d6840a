#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "phalanx/api/guide.h"
#include "phalanx/api/metrics.h"
#include "phalanx/api/ports.h"
#include "phalanx/api/refusal.h"
#include "phalanx/api/service.h"
#include "phalanx/base/clock.h"

namespace phalanx::api {

// One HTTP request's worth of generation: prompts.size() * sequences answers ("choices"), numbered
// prompt by prompt.
struct GenerateSpec {
  std::vector<std::vector<int32_t>> prompts;  // checked by check_prompt
  int sequences = 1;                          // per prompt; with a seed, sequence i uses seed + i
  engine::SamplingParams sampling;            // stop_token_ids: the request's own only
  std::vector<std::string> stops;
  bool include_stop = false;
  bool skip_special = true;
  bool ignore_eos = false;
  bool stream = false;                        // how tokenTimeout counts
  std::optional<double> client_timeout_s;     // the request's own limit
  std::string adapter;                        // name of a LoRA adapter; empty: the base model
  int32_t priority = 5;                       // 1 to 5
  std::string client;                         // who takes turns with others: a key's name or an address
  int beam_width = 0;                         // > 0: beam search; the best `sequences` are returned
  double length_penalty = 1;                  // of beam search
  bool want_tokens = false;                   // pieces have their tokens even without logprobs
  // What the tokens of one sequence must follow; called once per sequence. Null: nothing.
  std::function<std::shared_ptr<engine::TokenGuide>()> make_guide;
  Clock::time_point received = Clock::now();
  std::string name;                           // the client's own, for stop_named(); may be empty
};

struct TopToken {
  int32_t id;
  float logprob;
};
struct TokenPiece {
  int32_t id;
  float logprob;
  std::vector<TopToken> top;  // best first
};

// Text that has become certain for one choice.
struct Piece {
  int choice = 0;
  std::string text;                    // whole characters
  std::vector<TokenPiece> tokens;      // since the last piece; only if wanted
  std::vector<engine::PromptLogprob> prompt;  // with the first piece, if asked for
  engine::FinishReason finish = engine::FinishReason::kNone;  // kNone, kStop, kLength; kCancelled
                                                               // after stop_named()
  std::variant<std::monostate, std::string, int32_t> stop_reason;  // stop string, or the request's id
};

struct Usage {
  int64_t prompt_tokens = 0, completion_tokens = 0, cached_tokens = 0;
  int64_t queue_ms = 0;  // the longest that one of the sequences waited for its first step
};

struct Outcome {
  Usage usage;
  std::vector<double> cumulative_logprob;  // by choice
};

// How a dialect shows a generation. Called from one thread at a time, never two at once. Either
// fail(), or start(), pieces in order per choice (the last of each with `finish`), then finish() or
// fail().
class Answer {
 public:
  virtual ~Answer() = default;
  virtual void start() = 0;  // the engine has begun to answer
  // `usage` so far, over all choices.
  virtual void piece(const Piece& piece, const Usage& usage) = 0;
  virtual void finish(const Outcome& outcome) = 0;
  virtual void fail(const Refusal& refusal) = 0;
};

// Runs generations: submits, turns tokens into text off the engine's thread, looks for stop strings,
// counts, and ends what takes too long or whose client has left.
class GenerateService {
 public:
  GenerateService(const ServiceOptions& options, EnginePort& engine,
                  std::shared_ptr<const TextPort> text, std::shared_ptr<WorkQueue> work,
                  Metrics& metrics);
  ~GenerateService() { stop(); }
  // Ends what still runs; afterwards the engine is not called any more from threads of this object.
  // Idempotent.
  void stop();
  GenerateService(const GenerateService&) = delete;
  GenerateService& operator=(const GenerateService&) = delete;

  // The limits of the sheet's 1.2, with truncation where configured. Throws Refused.
  void check_prompt(std::vector<int32_t>* ids) const;

  // Submits. Throws Refused if the engine does not take it; afterwards only `answer` is told. Cancels
  // when `responder`'s client leaves.
  void start(GenerateSpec spec, std::unique_ptr<Answer> answer,
             const std::shared_ptr<Responder>& responder);

  [[nodiscard]] const TextPort& text() const { return *text_; }
  [[nodiscard]] const std::shared_ptr<GuideThreads>& guide_threads() const { return guide_threads_; }
  // Ends the running generation that its client called `name`. False: there is none.
  bool stop_named(const std::string& name);
  // Generations that have not ended.
  [[nodiscard]] int64_t active() const { return active_->load(); }

 private:
  class Generation;
  void watch(const std::stop_token& stop);

  const ServiceOptions options_;
  EnginePort& engine_;
  std::shared_ptr<const TextPort> text_;
  std::shared_ptr<WorkQueue> work_;
  Metrics& metrics_;
  std::shared_ptr<std::atomic<int64_t>> active_ = std::make_shared<std::atomic<int64_t>>(0);
  std::atomic<uint64_t> next_id_{0};
  std::mutex mutex_;
  std::vector<std::weak_ptr<Generation>> running_;
  const std::shared_ptr<GuideThreads> guide_threads_ = std::make_shared<GuideThreads>(1);
  std::jthread watcher_;
};

}  // namespace phalanx::api
