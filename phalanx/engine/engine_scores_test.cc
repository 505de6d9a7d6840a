#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "phalanx/engine/engine_testing.h"

// Log-probabilities of prompts: of every token but the first, whatever the pieces, the cache and
// preemption do.

namespace phalanx::engine {
namespace {

class ScoreRecorder final : public EventSink {
 public:
  void on_event(GenerateEvent event) override {
    if (!event.prompt.empty()) {
      const std::lock_guard lock(mutex_);
      EXPECT_TRUE(prompt_.empty()) << "the prompt came twice";
      EXPECT_EQ(event.output_tokens, 1);
      prompt_ = event.prompt;
    }
    tokens.on_event(std::move(event));
  }
  std::vector<PromptLogprob> prompt() {
    const std::lock_guard lock(mutex_);
    return prompt_;
  }
  Recorder tokens;

 private:
  std::mutex mutex_;
  std::vector<PromptLogprob> prompt_;
};

void expect_scores(const GenerateRequest& request, const std::vector<PromptLogprob>& found) {
  ASSERT_EQ(found.size() + 1, request.prompt.size()) << request.id;
  std::vector<float> logits(kHistoryVocab);
  for (size_t i = 0; i < found.size(); ++i) {
    history_logits(std::span(request.prompt).first(i + 1), logits.data());
    double sum = 0;
    for (const float l : logits) sum += std::exp(static_cast<double>(l));
    const int32_t token = request.prompt[i + 1];
    const float own = logits[static_cast<size_t>(token)];
    EXPECT_EQ(found[i].token, token);
    EXPECT_NEAR(found[i].logprob, static_cast<double>(own) - std::log(sum), 1e-4) << request.id << " " << i;
    std::vector<int32_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
    });
    EXPECT_EQ(order[static_cast<size_t>(found[i].rank) - 1], token);
    ASSERT_EQ(static_cast<int32_t>(found[i].top.size()), request.sampling.prompt_logprobs);
    for (size_t k = 0; k < found[i].top.size(); ++k) EXPECT_EQ(found[i].top[k].token, order[k]);
  }
}

// Scored and plain requests together; every third asks for scores.
void run_mixed(const EngineOptions& options, bool common_beginning) {
  std::vector<GenerateRequest> requests = mixed_requests(40, 60, 40);
  for (size_t i = 0; i < requests.size(); ++i) {
    if (common_beginning) requests[i].prompt.insert(requests[i].prompt.begin(), 17, 5);
    if (i % 3 == 0) requests[i].sampling.prompt_logprobs = static_cast<int32_t>(i % 4);
  }
  FakeExecutor executor(options);
  Engine engine(options, executor);
  std::vector<std::shared_ptr<ScoreRecorder>> sinks;
  for (const GenerateRequest& request : requests) {
    sinks.push_back(std::make_shared<ScoreRecorder>());
    ASSERT_EQ(engine.submit(request, sinks.back(), nullptr), SubmitResult::kAccepted);
  }
  for (size_t i = 0; i < requests.size(); ++i) {
    (void)sinks[i]->tokens.wait();
    EXPECT_EQ(sinks[i]->tokens.tokens(), expected_tokens(requests[i], options)) << requests[i].id;
    if (i % 3 == 0) {
      expect_scores(requests[i], sinks[i]->prompt());
    } else {
      EXPECT_TRUE(sinks[i]->prompt().empty());
    }
  }
}

TEST(PromptScores, AreThoseOfEveryTokenWhateverTheRowsThatFitAStep) {
  EngineOptions options = small_options();
  for (const int64_t rows : {0, 96}) {
    options.max_step_rows = rows;
    run_mixed(options, false);
  }
  options.max_batch = 1;  // one row: one token of the prompt per step
  options.max_prefill_batch = 1;
  options.max_step_rows = 0;
  run_mixed(options, false);
}

TEST(PromptScores, NeedEveryTokenComputedInSpiteOfThePrefixCache) {
  const EngineOptions options = small_options();
  FakeExecutor executor(options);
  Engine engine(options, executor);
  GenerateRequest request = request_of("plain", std::vector<int32_t>(41, 7), 3);
  const auto plain = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(request, plain, nullptr), SubmitResult::kAccepted);
  (void)plain->wait();
  request.id = "scored";
  request.sampling.prompt_logprobs = 2;
  const auto scored = std::make_shared<ScoreRecorder>();
  ASSERT_EQ(engine.submit(request, scored, nullptr), SubmitResult::kAccepted);
  EXPECT_EQ(scored->tokens.wait().cached_tokens, 0);
  expect_scores(request, scored->prompt());
  EXPECT_EQ(scored->tokens.tokens(), plain->tokens());
}

TEST(PromptScores, SurvivePreemption) {
  EngineOptions options = small_options();
  options.blocks = 34;
  options.max_sequence = 130;
  options.max_batch = 12;
  options.max_step_rows = 16;
  run_mixed(options, true);
}

}  // namespace
}  // namespace phalanx::engine
