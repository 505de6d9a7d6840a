#pragma once

// For tests of the engine: small options, an executor over HistoryModel, a sink that remembers, and
// what a request must produce without an engine.

#include <gtest/gtest.h>

#include <algorithm>
#include <condition_variable>
#include <functional>
#include <limits>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "phalanx/engine/drafter.h"
#include "phalanx/engine/engine.h"
#include "phalanx/engine/history_model.h"
#include "phalanx/engine/prefill_pace.h"
#include "phalanx/engine/sampler.h"

namespace phalanx::engine {

inline EngineOptions small_options() {
  return {.vocab_size = kHistoryVocab,
          .block_size = 4,
          .blocks = 512,
          .max_sequence = 200,
          .max_input_tokens = 150,
          .max_prefill_tokens = 64,
          .max_prefill_batch = 8,
          .max_batch = 32,
          .max_output_tokens = 100,
          .max_step_tokens = 96,
          .max_queue = 1000,
          .step_seconds = 20};
}

inline StepLimits limits_of(const EngineOptions& o) {
  return {.max_tokens = o.max_step_tokens,
          .max_rows = std::max(o.max_step_rows, o.max_batch),
          .max_sequence = o.max_sequence,
          .blocks = o.blocks,
          .block_size = o.block_size,
          .vocab_size = o.vocab_size,
          .draft_sequences = o.draft_model ? o.draft_batch : 0,
          .max_adapters = o.max_adapters};
}

// What one plan held.
struct Seen {
  StepKind kind{};
  int64_t tokens = 0, prefill_tokens = 0, prefill_sequences = 0, decodes = 0;
};

// Decodes every plan, computes it with HistoryModel, can stand still and can fail.
class FakeExecutor final : public StepExecutor {
 public:
  explicit FakeExecutor(const EngineOptions& options)
      : limits_(limits_of(options)),
        model(options.blocks, options.block_size),
        draft_model(options.blocks, options.block_size) {
    logits_.resize(static_cast<size_t>(limits_.max_rows * limits_.vocab_size));
    guesses_.resize(static_cast<size_t>(limits_.max_rows));
    if (options.draft_model) drafter_.emplace(draft_model, limits_);
  }

  void send(std::span<const std::byte> plan, std::span<const std::byte> draft_order) override {
    buffer_.assign(plan.begin(), plan.end());
    view_.decode(buffer_, limits_);
    if (!draft_order.empty()) {
      EXPECT_LE(std::ssize(draft_order), max_draft_order_bytes(limits_));
      EXPECT_TRUE(drafter_.has_value());
      drafter_->run(draft_order, view_, buffer_, guesses_);
      view_.decode(buffer_, limits_);
    }
    EXPECT_EQ(view_.header().step, ++steps_);
    Seen seen{.kind = view_.header().kind, .tokens = view_.header().num_tokens};
    for (const PlannedSequence& s : view_.sequences()) {
      const bool decode = s.token_count == 1 && s.context > 1;
      seen.decodes += decode ? 1 : 0;
      seen.prefill_sequences += decode ? 0 : 1;
      seen.prefill_tokens += decode ? 0 : s.token_count;
    }
    const std::lock_guard lock(mutex_);
    seen_.push_back(seen);
    changed_.notify_all();
  }

  std::span<const float> wait(Deadline deadline, StepTiming* timing) override {
    {
      std::unique_lock lock(mutex_);
      const bool go = changed_.wait_until(lock, deadline.when(), [&] {
        return allowed_ > 0 || !abort_reason_.empty() || error_;
      });
      if (!abort_reason_.empty()) throw Error(Code::kAborted, abort_reason_);
      if (error_) throw *error_;
      if (!go) throw Error(Code::kDeadlineExceeded, "the step took too long");
      --allowed_;
    }
    if (view_.header().kind == StepKind::kCompute) {
      model.forward(view_.inputs(), logits_.data());
    }
    if (view_.header().kind == StepKind::kAdapter) follow_order();
    if (timing != nullptr) {
      *timing = {.total_ns = step_ns ? step_ns(seen().back()) : 1000,
                 .compute_ns = 900,
                 .communication_ns = 100};
    }
    return std::span<const float>(logits_).first(view_.header().num_rows *
                                                 static_cast<size_t>(kHistoryVocab));
  }

  [[nodiscard]] std::span<const AdapterReport> adapter_reports() const override { return reports_; }

  // As one rank would tell of a step with a single gather.
  [[nodiscard]] std::span<const RankTrace> traces() const override { return traces_; }
  [[nodiscard]] std::span<const int32_t> guesses() const override { return guesses_; }

  void abort(const std::string& reason) noexcept override {
    const std::lock_guard lock(mutex_);
    if (abort_reason_.empty()) abort_reason_ = reason;
    changed_.notify_all();
  }

  // Only that many more steps are computed.
  void allow(int64_t steps) {
    const std::lock_guard lock(mutex_);
    allowed_ = steps;
    changed_.notify_all();
  }
  void fail(const Error& error) {
    const std::lock_guard lock(mutex_);
    error_ = error;
    changed_.notify_all();
  }
  // Until that many plans have been sent.
  void wait_for_plans(size_t count) {
    std::unique_lock lock(mutex_);
    ASSERT_TRUE(
        changed_.wait_for(lock, std::chrono::seconds(20), [&] { return seen_.size() >= count; }));
  }
  std::vector<Seen> seen() {
    const std::lock_guard lock(mutex_);
    return seen_;
  }
  std::string abort_reason() {
    const std::lock_guard lock(mutex_);
    return abort_reason_;
  }

 private:
  void follow_order() {
    const AdapterOrder& order = view_.order();
    if (order.act == AdapterAct::kRead) return loader_.begin(order.slot, std::string(view_.order_path()));
    if (order.act == AdapterAct::kDrop) return loader_.drop(order.slot);
    reports_.assign(1, loader_.report());
    loader_.settle(reports_);
  }

  const StepLimits limits_;
  std::vector<std::byte> buffer_;
  StepPlanView view_;
  std::vector<float> logits_;
  std::vector<int32_t> guesses_;
  std::optional<Drafter> drafter_;
  std::vector<RankTrace> traces_{{.count = 1, .length = 10, .collectives = {{{2, 3, 1, 64}}}}};
  uint64_t steps_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Seen> seen_;
  int64_t allowed_ = std::numeric_limits<int64_t>::max();
  std::string abort_reason_;
  std::optional<Error> error_;

 public:
  std::function<int64_t(const Seen&)> step_ns;  // how long a step says it took
  HistoryModel model;                           // engine thread
  HistoryModel draft_model;                     // the same; for options with one

 private:
  AdapterLoader loader_{model};
  std::vector<AdapterReport> reports_;
};

class Recorder final : public EventSink {
 public:
  void on_event(GenerateEvent event) override {
    const std::lock_guard lock(mutex_);
    EXPECT_FALSE(final_) << "an event after the final one";
    if (event.token >= 0) {
      tokens_.push_back(event.token);
      EXPECT_EQ(event.output_tokens, static_cast<int32_t>(tokens_.size()));
    }
    if (event.finish != FinishReason::kNone) final_ = std::move(event);
    changed_.notify_all();
  }
  GenerateEvent wait() {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(
        changed_.wait_for(lock, std::chrono::seconds(30), [&] { return final_.has_value(); }));
    return final_.value_or(GenerateEvent{});
  }
  void wait_for_tokens(size_t count) {
    std::unique_lock lock(mutex_);
    ASSERT_TRUE(changed_.wait_for(lock, std::chrono::seconds(30),
                                  [&] { return tokens_.size() >= count; }));
  }
  std::vector<int32_t> tokens() {
    const std::lock_guard lock(mutex_);
    return tokens_;
  }
  bool ended() {
    const std::lock_guard lock(mutex_);
    return final_.has_value();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int32_t> tokens_;
  std::optional<GenerateEvent> final_;
};

// What the request must produce, without engine, batch or cache.
inline std::vector<int32_t> expected_tokens(const GenerateRequest& request, const EngineOptions& o) {
  Sampler sampler(kHistoryVocab);
  TokenCounts counts(kHistoryVocab, kHistoryVocab);
  for (const int32_t token : request.prompt) counts.add_prompt(token);
  std::vector<int32_t> tokens = request.prompt;
  std::vector<float> logits(kHistoryVocab);
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  const int64_t outputs = std::min({int64_t{request.sampling.max_tokens}, o.max_output_tokens,
                                    o.max_sequence - prompt, o.blocks * o.block_size + 1 - prompt});
  for (int64_t i = 0; i < outputs; ++i) {
    history_logits(tokens, logits.data());
    const SampleResult result = sampler.sample(logits,
                                               {.params = &request.sampling,
                                                .seed = request.sampling.seed.value_or(0),
                                                .position = static_cast<uint32_t>(tokens.size()),
                                                .outputs = static_cast<int32_t>(i),
                                                .counts = &counts},
                                               nullptr);
    tokens.push_back(result.token);
    counts.add_output(result.token);
    const auto& stops = request.sampling.stop_token_ids;
    if (std::find(stops.begin(), stops.end(), result.token) != stops.end()) break;
  }
  return {tokens.begin() + prompt, tokens.end()};
}

inline GenerateRequest request_of(std::string id, std::vector<int32_t> prompt, int32_t max_tokens) {
  GenerateRequest request{.id = std::move(id), .prompt = std::move(prompt)};
  request.sampling.temperature = 0;
  request.sampling.max_tokens = max_tokens;
  return request;
}

// Prompts of 1 to max_prompt tokens, all ways of sampling.
inline std::vector<GenerateRequest> mixed_requests(int count, int max_prompt, int max_tokens) {
  std::mt19937 random(11);
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < count; ++i) {
    std::vector<int32_t> prompt(1 + random() % static_cast<unsigned>(max_prompt));
    for (int32_t& token : prompt) token = static_cast<int32_t>(random() % kHistoryVocab);
    GenerateRequest r = request_of("r" + std::to_string(i), std::move(prompt),
                                   1 + static_cast<int32_t>(random() % max_tokens));
    if (i % 3 != 0) r.sampling.temperature = 0.5f + static_cast<float>(i % 5) * 0.3f;
    if (i % 4 == 1) r.sampling.top_k = 5;
    if (i % 4 == 2) r.sampling.top_p = 0.8f;
    if (i % 5 == 3) r.sampling.repetition_penalty = 1.3f;
    if (i % 5 == 4) r.sampling.frequency_penalty = 0.5f;
    if (i % 7 == 1) r.sampling.stop_token_ids = {3, 4, 5, 6};
    if (i % 14 == 1) r.sampling.min_tokens = 4;
    r.sampling.seed = 1000u + static_cast<uint64_t>(i);
    requests.push_back(std::move(r));
  }
  return requests;
}

}  // namespace phalanx::engine
