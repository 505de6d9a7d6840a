#include <gtest/gtest.h>

#include "phalanx/engine/engine_testing.h"

// Speculation by prompt look-up: fewer steps, the same tokens.

namespace phalanx::engine {
namespace {

EngineOptions drafting(int64_t tokens) {
  EngineOptions options = small_options();
  options.draft_tokens = tokens;
  options.max_step_rows = 96;
  return options;
}

// Logits that prefer to repeat what followed the last token first, so that guesses are often right.
void make_repetitive(FakeExecutor& executor) {
  executor.model.on_forward = [](const models::StepInputs& in, float* logits) {
    for (size_t row = 0; row < in.sample_rows.size(); ++row) {
      const int32_t token = in.tokens[static_cast<size_t>(in.sample_rows[row])];
      const int32_t position = in.positions[static_cast<size_t>(in.sample_rows[row])];
      // A cycle of 7 with a disturbance now and then.
      const int32_t next = position % 23 == 0 ? position % 31 : (token + 1) % 7;
      logits[static_cast<int64_t>(row) * kHistoryVocab + next] += 20;
    }
  };
}

struct Results {
  std::vector<std::vector<int32_t>> tokens;
  EngineStats stats;
};

Results run(const EngineOptions& options, const std::vector<GenerateRequest>& requests, bool repetitive) {
  FakeExecutor executor(options);
  if (repetitive) make_repetitive(executor);
  Engine engine(options, executor);
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (const GenerateRequest& request : requests) {
    sinks.push_back(std::make_shared<Recorder>());
    EXPECT_EQ(engine.submit(request, sinks.back(), nullptr), SubmitResult::kAccepted);
  }
  Results result;
  for (const auto& sink : sinks) {
    (void)sink->wait();
    result.tokens.push_back(sink->tokens());
  }
  EXPECT_TRUE(engine.drain(Deadline::in_seconds(20)));
  const Deadline deadline = Deadline::in_seconds(20);
  do result.stats = engine.stats();
  while (result.stats.blocks_free != options.blocks && !deadline.passed());
  EXPECT_EQ(result.stats.blocks_free, options.blocks);
  return result;
}

TEST(Drafts, ChangeNoTokenOfRandomText) {
  const std::vector<GenerateRequest> requests = mixed_requests(48, 60, 60);
  const Results drafted = run(drafting(5), requests, false);
  for (size_t i = 0; i < requests.size(); ++i)
    EXPECT_EQ(drafted.tokens[i], expected_tokens(requests[i], drafting(5))) << requests[i].id;
}

TEST(Drafts, TakeFewerStepsForTheSameTokens) {
  std::vector<GenerateRequest> requests = mixed_requests(3, 20, 1);
  for (size_t i = 0; i < requests.size(); ++i) requests[i].sampling.max_tokens = 90;
  requests[1].sampling.stop_token_ids = {};
  const Results plain = run(drafting(0), requests, true);
  const Results drafted = run(drafting(6), requests, true);
  EXPECT_EQ(drafted.tokens, plain.tokens);
  // Also where the requests come so slowly that they run one after the other.
  EXPECT_LT(drafted.stats.steps * 3, 2u * 3 * 90);
  EXPECT_GT(drafted.stats.accepted_draft_tokens, 100u);
  EXPECT_GE(drafted.stats.draft_tokens, drafted.stats.accepted_draft_tokens);
  EXPECT_EQ(plain.stats.draft_tokens, 0u);
}

TEST(Drafts, KeepPenaltiesStopsAndScores) {
  std::vector<GenerateRequest> requests = mixed_requests(30, 20, 60);
  for (size_t i = 0; i < requests.size(); ++i)
    if (i % 4 == 0) requests[i].sampling.prompt_logprobs = 1;
  EngineOptions options = drafting(4);
  options.draft_batch = 32;
  EngineOptions without = options;
  without.draft_tokens = 0;
  const Results drafted = run(options, requests, true);
  EXPECT_GT(drafted.stats.accepted_draft_tokens, 0u);
  EXPECT_EQ(drafted.tokens, run(without, requests, true).tokens);
}

TEST(Drafts, InATinyCacheWithPreemption) {
  EngineOptions options = drafting(6);
  options.blocks = 34;
  options.max_sequence = 130;
  options.max_batch = 12;
  std::vector<GenerateRequest> requests = mixed_requests(40, 60, 60);
  EngineOptions without = options;
  without.draft_tokens = 0;
  const Results drafted = run(options, requests, true);
  EXPECT_GT(drafted.stats.preemptions, 0u);
  EXPECT_GT(drafted.stats.accepted_draft_tokens, 0u);
  EXPECT_EQ(drafted.tokens, run(without, requests, true).tokens);
}

}  // namespace
}  // namespace phalanx::engine
