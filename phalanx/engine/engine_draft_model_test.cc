#include <gtest/gtest.h>

#include <limits>

#include "phalanx/engine/draft_pace.h"
#include "phalanx/engine/engine_testing.h"

// Speculation by a draft model: fewer steps, the same tokens. That the draft model's KV cache holds what
// it should HistoryModel sees: it reads every position of the history back through the block tables.

namespace phalanx::engine {
namespace {

EngineOptions drafting(int64_t tokens) {
  EngineOptions options = small_options();
  options.draft_tokens = tokens;
  options.draft_model = tokens > 0;
  options.max_step_rows = 96;
  return options;
}

// A draft model that is right about `share` of 8 times.
void make_forgetful(FakeExecutor& executor, int share) {
  executor.draft_model.on_forward = [share](const models::StepInputs& in, float* logits) {
    for (size_t row = 0; row < in.sample_rows.size(); ++row) {
      const int32_t position = in.positions[static_cast<size_t>(in.sample_rows[row])];
      if (position * 5 % 8 >= share)
        logits[static_cast<int64_t>(row) * kHistoryVocab + position % kHistoryVocab] += 20;
    }
  };
}

struct Results {
  std::vector<std::vector<int32_t>> tokens;
  EngineStats stats;
  std::vector<Seen> seen;
};

Results run(const EngineOptions& options, const std::vector<GenerateRequest>& requests,
            int right_of_8 = 8) {
  FakeExecutor executor(options);
  make_forgetful(executor, right_of_8);
  executor.allow(0);  // all are there before the first step is computed
  Engine engine(options, executor);
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (const GenerateRequest& request : requests) {
    sinks.push_back(std::make_shared<Recorder>());
    EXPECT_EQ(engine.submit(request, sinks.back(), nullptr), SubmitResult::kAccepted);
  }
  executor.allow(std::numeric_limits<int64_t>::max());
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
  result.seen = executor.seen();
  return result;
}

std::vector<GenerateRequest> greedy_requests(int count, int prompt, int outputs) {
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < count; ++i) {
    std::vector<int32_t> tokens;
    for (int t = 0; t < prompt + 3 * i; ++t) tokens.push_back((t * 7 + i * 13) % kHistoryVocab);
    requests.push_back(request_of("g" + std::to_string(i), std::move(tokens), outputs));
  }
  return requests;
}

TEST(DraftModel, OfTheTargetItselfIsAlwaysRight) {
  const auto requests = greedy_requests(6, 20, 61);
  const Results plain = run(drafting(0), requests);
  const Results drafted = run(drafting(5), requests);
  EXPECT_EQ(drafted.tokens, plain.tokens);
  const EngineStats& s = drafted.stats;
  // The last step's draft is not looked at after the last token.
  EXPECT_GT(s.accepted_draft_tokens * 10, s.draft_tokens * 9) << s.draft_tokens;
  EXPECT_LT(s.steps * 3, plain.stats.steps);  // the trial of steps without drafts included
  EXPECT_GE(s.draft_tokens, s.drafts);
  uint64_t by_place = 0;
  for (const uint64_t count : s.accepted_by_place) by_place += count;
  EXPECT_EQ(by_place, s.accepted_draft_tokens);
  EXPECT_LE(s.accepted_by_place[1], s.accepted_by_place[0]);
  EXPECT_EQ(s.accepted_by_place[5], 0u);
}

TEST(DraftModel, ChangesNoTokenHoweverOftenItIsRight) {
  const std::vector<GenerateRequest> requests = mixed_requests(48, 60, 60);
  for (const int right : {0, 3, 7, 8}) {
    const Results drafted = run(drafting(5), requests, right);
    for (size_t i = 0; i < requests.size(); ++i)
      EXPECT_EQ(drafted.tokens[i], expected_tokens(requests[i], drafting(5)))
          << requests[i].id << " with " << right << " of 8 right";
    EXPECT_GT(drafted.stats.draft_tokens, 0u);
    if (right > 3) {
      EXPECT_GT(drafted.stats.accepted_draft_tokens, 0u);
    }
  }
}

TEST(DraftModel, KeepsPenaltiesStopsAndScores) {
  auto requests = greedy_requests(5, 9, 50);
  requests[0].sampling.repetition_penalty = 1.3f;
  requests[1].sampling.stop_token_ids = {3, 4, 5, 6, 7};
  requests[2].sampling.prompt_logprobs = 2;
  requests[2].sampling.logprobs = 3;
  requests[3].sampling.temperature = 0.9f;
  requests[3].sampling.seed = 7;
  const Results drafted = run(drafting(4), requests, 6);
  EXPECT_EQ(drafted.tokens, run(drafting(0), requests).tokens);
  EXPECT_GT(drafted.stats.accepted_draft_tokens, 0u);
}

TEST(DraftModel, WithPreemptionInATinyCache) {
  EngineOptions options = drafting(6);
  options.blocks = 40;
  options.max_sequence = 120;
  const auto requests = greedy_requests(12, 20, 60);
  EngineOptions without = options;
  without.draft_tokens = 0;
  without.draft_model = false;
  const Results drafted = run(options, requests, 7);
  EXPECT_GT(drafted.stats.preemptions, 0u);
  EXPECT_GT(drafted.stats.accepted_draft_tokens, 0u);
  EXPECT_EQ(drafted.tokens, run(without, requests).tokens);
}

// More sequences than may draft: the draft model is left behind, and catches up when there are fewer.
TEST(DraftModel, FollowsACrowdAndDraftsAfterIt) {
  EngineOptions options = drafting(5);
  options.draft_batch = 3;
  std::vector<GenerateRequest> requests = greedy_requests(8, 10, 30);
  requests.push_back(request_of("long", {1, 2, 3}, 90));
  const Results drafted = run(options, requests);
  EngineOptions without = options;
  without.draft_tokens = 0;
  without.draft_model = false;
  EXPECT_EQ(drafted.tokens, run(without, requests).tokens);
  EXPECT_GT(drafted.stats.accepted_draft_tokens * 10, drafted.stats.draft_tokens * 8);
}

// Where a token costs its share of a step, and none is guessed right, guessing ends soon.
TEST(DraftModel, GuessesOnlyWhereThatPays) {
  const auto drafts_of = [](int right, bool cores_bind) {
    const EngineOptions options = drafting(4);
    FakeExecutor executor(options);
    make_forgetful(executor, right);
    executor.step_ns = [=](const Seen& seen) { return 1000 * (cores_bind ? seen.tokens : 1); };
    Engine engine(options, executor);
    const GenerateRequest request = greedy_requests(1, 10, 90)[0];
    const auto sink = std::make_shared<Recorder>();
    EXPECT_EQ(engine.submit(request, sink, nullptr), SubmitResult::kAccepted);
    (void)sink->wait();
    EXPECT_EQ(sink->tokens(), expected_tokens(request, options));
    EXPECT_TRUE(engine.drain(Deadline::in_seconds(20)));
    return engine.stats().drafts;
  };
  EXPECT_EQ(drafts_of(0, true), static_cast<uint64_t>(DraftPace::kTrials));
  EXPECT_GT(drafts_of(0, false), 60u);
  EXPECT_GT(drafts_of(8, false), 10u);
}

// Blocks that are published before the draft model has seen them are found, and made up for.
TEST(DraftModel, CatchesUpWithBlocksThatOthersLeft) {
  const EngineOptions options = drafting(4);
  FakeExecutor executor(options);
  executor.step_ns = [](const Seen& seen) {
    return seen.decodes + seen.prefill_sequences == 1 ? 1000 * seen.tokens * seen.tokens : 1000;
  };
  Engine engine(options, executor);
  const GenerateRequest first = greedy_requests(1, 40, 60)[0];
  auto sink = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(first, sink, nullptr), SubmitResult::kAccepted);
  (void)sink->wait();
  const uint64_t before = [&] {
    EXPECT_TRUE(engine.stats().drafts <= static_cast<uint64_t>(DraftPace::kTrials));
    return engine.stats().accepted_draft_tokens;
  }();
  std::vector<int32_t> text = first.prompt;
  const auto answer = sink->tokens();
  text.insert(text.end(), answer.begin(), answer.end());
  std::vector<GenerateRequest> more;
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (int32_t i = 0; i < 3; ++i) {
    more.push_back(request_of("more" + std::to_string(i), text, 40));
    more.back().prompt.push_back(i);
    sinks.push_back(std::make_shared<Recorder>());
    ASSERT_EQ(engine.submit(more.back(), sinks.back(), nullptr), SubmitResult::kAccepted);
  }
  for (size_t i = 0; i < more.size(); ++i) {
    EXPECT_GE(sinks[i]->wait().cached_tokens, 90);
    EXPECT_EQ(sinks[i]->tokens(), expected_tokens(more[i], options));
  }
  EXPECT_GT(engine.stats().accepted_draft_tokens, before + 30);
}

// The second request finds the first one's blocks, with the draft model's half of them.
TEST(DraftModel, SharesPrefixes) {
  const EngineOptions options = drafting(5);
  FakeExecutor executor(options);
  Engine engine(options, executor);
  const auto answer = [&](const GenerateRequest& request) {
    auto sink = std::make_shared<Recorder>();
    EXPECT_EQ(engine.submit(request, sink, nullptr), SubmitResult::kAccepted);
    const GenerateEvent last = sink->wait();
    return std::pair(sink->tokens(), last.cached_tokens);
  };
  GenerateRequest first = greedy_requests(1, 40, 30)[0];
  const auto [tokens, cached] = answer(first);
  EXPECT_EQ(cached, 0);
  EXPECT_EQ(tokens, expected_tokens(first, options));
  // A second turn: the answer is part of the prompt, and cached too.
  GenerateRequest second = request_of("second", first.prompt, 30);
  second.prompt.insert(second.prompt.end(), tokens.begin(), tokens.end());
  second.prompt.push_back(5);
  const auto [more, found] = answer(second);
  EXPECT_GE(found, 60);
  EXPECT_EQ(more, expected_tokens(second, options));
  EXPECT_TRUE(engine.drain(Deadline::in_seconds(20)));
  const EngineStats stats = engine.stats();
  EXPECT_GT(stats.accepted_draft_tokens * 10, stats.draft_tokens * 9);
}

TEST(DraftModel, GoesOnAfterALostGeneration) {
  EngineOptions options = drafting(5);
  options.recover = true;
  const auto requests = greedy_requests(6, 20, 60);
  FakeExecutor lost(options);
  FakeExecutor next(options);
  Engine engine(options, lost);
  lost.allow(4);
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (const GenerateRequest& request : requests) {
    sinks.push_back(std::make_shared<Recorder>());
    EXPECT_EQ(engine.submit(request, sinks.back(), nullptr), SubmitResult::kAccepted);
  }
  sinks[0]->wait_for_tokens(3);
  lost.fail(Error(Code::kUnavailable, "rank 1 left"));
  engine.suspend(Deadline::in_seconds(20));
  engine.resume(next, 2, options.blocks);
  for (size_t i = 0; i < requests.size(); ++i) {
    (void)sinks[i]->wait();
    EXPECT_EQ(sinks[i]->tokens(), expected_tokens(requests[i], options));
  }
  const EngineStats stats = engine.stats();
  EXPECT_GT(stats.accepted_draft_tokens * 10, stats.draft_tokens * 8);
}

TEST(DraftModel, OptionsAreChecked) {
  EngineOptions options = drafting(17);
  FakeExecutor executor(drafting(5));
  try {
    Engine engine(options, executor);
    ADD_FAILURE() << "17 guesses were taken";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("draft_tokens"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("at most 16"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace phalanx::engine
