#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "phalanx/api/ports.h"

namespace phalanx::api {

struct BeamOptions {
  std::string id;                    // of the search; its steps are <id>.<step>.<beam>
  std::vector<int32_t> prompt;
  int width = 1;                     // beams followed
  int returned = 1;                  // of them, the best
  double length_penalty = 1;         // score: log-probability / length^penalty
  int32_t max_tokens = 16, min_tokens = 0;
  int64_t max_sequence = 0;          // prompt and output together
  std::vector<int32_t> stop_token_ids;
  int32_t logprobs = -1;             // as in SamplingParams, for the answer
  int32_t priority = 5;
  std::string adapter;               // as in GenerateRequest
  std::string client;
};

// Beam search over the engine's ordinary requests: every step asks for one token after each beam with
// its 2 * width best continuations, and keeps the best. Ties go to the lower parent, then to the lower
// token. A beam that meets a stop token is finished; the search ends when no running beam can beat the
// finished ones, or at max_tokens. The prefix cache spares computing a beam again.
class BeamSearch final : public std::enable_shared_from_this<BeamSearch> {
 public:
  // Called with the tokens of returned beam `index`, best first, all at the end; or once with an
  // event that says how the search failed. Any thread.
  using Deliver = std::function<void(size_t index, engine::GenerateEvent event)>;
  BeamSearch(BeamOptions options, EnginePort& engine, std::shared_ptr<WorkQueue> work, Deliver deliver);
  // The result is the engine's for the first step.
  engine::SubmitResult start(std::string* detail);
  // Nothing is delivered any more.
  void cancel();

 private:
  struct Beam {
    std::vector<int32_t> tokens;
    std::vector<float> logprobs;
    std::vector<std::vector<engine::TokenLogprob>> tops;
    double sum = 0;
    bool stopped = false;
  };
  struct Answered {
    std::vector<engine::TokenLogprob> top;
    bool arrived = false;
  };
  class Sink;
  engine::SubmitResult submit_step(std::string* detail);
  void on_event(int step, size_t beam, engine::GenerateEvent event);
  void advance();
  void finish();
  void fail(const Error& error);
  [[nodiscard]] double score(const Beam& beam) const;

  const BeamOptions options_;
  EnginePort& engine_;
  std::shared_ptr<WorkQueue> work_;
  std::mutex mutex_;
  Deliver deliver_;                  // null after the end
  int step_ = 0;
  std::vector<Beam> running_;
  std::vector<Beam> finished_;
  std::vector<Answered> answers_;    // of this step, by running beam
  size_t missing_ = 0;
};

}  // namespace phalanx::api
