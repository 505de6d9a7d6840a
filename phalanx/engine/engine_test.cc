#include "phalanx/engine/engine.h"

#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <set>
#include <thread>

#include "phalanx/engine/engine_testing.h"

namespace phalanx::engine {
namespace {

struct Case {
  const char* name;
  int64_t blocks, max_batch, max_prefill_tokens, max_prefill_batch, max_step_tokens;
  bool preempts;
};

class Batches : public ::testing::TestWithParam<Case> {};

TEST_P(Batches, TokensDoNotDependOnCompany) {
  const Case& c = GetParam();
  EngineOptions options = small_options();
  options.blocks = c.blocks;
  options.max_batch = c.max_batch;
  options.max_prefill_tokens = c.max_prefill_tokens;
  options.max_prefill_batch = c.max_prefill_batch;
  options.max_step_tokens = c.max_step_tokens;
  const auto requests = mixed_requests(65, 60, 50);
  for (const unsigned order : {0u, 1u, 2u}) {
    std::vector<size_t> arrival(requests.size());
    for (size_t i = 0; i < arrival.size(); ++i) arrival[i] = i;
    std::mt19937 random(order);
    if (order > 0) std::shuffle(arrival.begin(), arrival.end(), random);
    FakeExecutor executor(options);
    Engine engine(options, executor);
    std::map<size_t, std::shared_ptr<Recorder>> sinks;
    for (const size_t i : arrival) {
      sinks[i] = std::make_shared<Recorder>();
      std::string detail;
      ASSERT_EQ(engine.submit(requests[i], sinks[i], &detail), SubmitResult::kAccepted) << detail;
      if (order == 2 && i % 9 == 0) sinks[i]->wait_for_tokens(1);
    }
    for (auto& [i, sink] : sinks) {
      const GenerateEvent last = sink->wait();
      const auto expected = expected_tokens(requests[i], options);
      EXPECT_EQ(sink->tokens(), expected) << "request " << i;
      EXPECT_EQ(last.prompt_tokens, static_cast<int32_t>(requests[i].prompt.size()));
      const auto& stops = requests[i].sampling.stop_token_ids;
      const bool stopped =
          std::find(stops.begin(), stops.end(), expected.back()) != stops.end();
      EXPECT_EQ(last.finish, stopped ? FinishReason::kStop : FinishReason::kLength);
      EXPECT_EQ(last.stop_token, stopped ? expected.back() : -1);
    }
    EXPECT_TRUE(engine.drain(Deadline::in_seconds(10)));
    const EngineStats stats = engine.stats();
    EXPECT_EQ(stats.preemptions > 0, c.preempts);
    for (const Seen& seen : executor.seen()) {
      EXPECT_LE(seen.tokens, c.max_step_tokens);
      EXPECT_LE(seen.prefill_tokens, c.max_prefill_tokens);
      EXPECT_LE(seen.prefill_sequences, c.max_prefill_batch);
      EXPECT_LE(seen.prefill_sequences + seen.decodes, c.max_batch);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Engine, Batches,
    ::testing::Values(Case{"roomy", 2048, 64, 512, 64, 600, false},
                      Case{"one_at_a_time", 64, 1, 512, 1, 512, false},
                      Case{"chunked", 2048, 16, 7, 2, 24, false},
                      Case{"tiny_pool", 30, 16, 64, 8, 96, true},
                      Case{"tiny_pool_chunked", 29, 8, 5, 3, 11, true}),
    [](const auto& info) { return info.param.name; });

TEST(Engine, BlocksAndCountsReturn) {
  const EngineOptions options = small_options();
  FakeExecutor executor(options);
  Engine engine(options, executor);
  const auto sink = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(request_of("a", {1, 2, 3, 4, 5}, 9), sink, nullptr),
            SubmitResult::kAccepted);
  EXPECT_EQ(sink->wait().finish, FinishReason::kLength);
  while (engine.stats().succeeded == 0) std::this_thread::yield();
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.blocks_free, options.blocks);
  EXPECT_EQ(stats.blocks_total, options.blocks);
  EXPECT_EQ(stats.received, 1u);
  EXPECT_EQ(stats.prompt_tokens, 5u);
  EXPECT_EQ(stats.output_tokens, 9u);
  EXPECT_EQ(stats.steps, 9u);
  EXPECT_EQ(stats.compute_ns, 9u * 900);
  EXPECT_EQ(stats.running, 0);
}

TEST(Engine, DecodingGoesOnDuringLongPrompts) {
  EngineOptions options = small_options();
  options.max_prefill_tokens = 8;
  options.max_step_tokens = 32;
  FakeExecutor executor(options);
  executor.allow(3);
  Engine engine(options, executor);
  const auto first = std::make_shared<Recorder>();
  const auto second = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(request_of("a", {1, 2}, 60), first, nullptr), SubmitResult::kAccepted);
  executor.wait_for_plans(4);
  ASSERT_EQ(engine.submit(request_of("b", std::vector<int32_t>(64, 7), 2), second, nullptr),
            SubmitResult::kAccepted);
  executor.allow(1000);
  (void)second->wait();
  const auto seen = executor.seen();
  int mixed = 0;
  for (const Seen& s : seen) mixed += s.prefill_tokens == 8 && s.decodes == 1 ? 1 : 0;
  EXPECT_EQ(mixed, 8);  // 64 prompt tokens by 8, each step with the other sequence's next token
}

TEST(Engine, IdlePlansKeepTheLinksChecked) {
  EngineOptions options = small_options();
  options.idle_plan_seconds = 0.01;
  FakeExecutor executor(options);
  Engine engine(options, executor);
  executor.wait_for_plans(3);
  for (const Seen& seen : executor.seen()) EXPECT_EQ(seen.kind, StepKind::kIdle);
  const auto sink = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(request_of("a", {1, 2}, 3), sink, nullptr), SubmitResult::kAccepted);
  (void)sink->wait();
  EXPECT_EQ(sink->tokens(), expected_tokens(request_of("a", {1, 2}, 3), options));
  executor.fail(Error(Code::kUnavailable, "rank 1 was lost"));
  for (int i = 0; i < 1000 && !engine.failure(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_TRUE(engine.failure().has_value());
}

TEST(Engine, NanLogitsFailOneRequestAlone) {
  const EngineOptions options = small_options();
  FakeExecutor executor(options);
  executor.model.on_forward = [](const models::StepInputs& in, float* logits) {
    for (size_t row = 0; row < in.sample_rows.size(); ++row) {
      if (in.positions[static_cast<size_t>(in.sample_rows[row])] == 11) {
        logits[row * kHistoryVocab + 50] = std::numeric_limits<float>::quiet_NaN();
      }
    }
  };
  Engine engine(options, executor);
  const auto bad = std::make_shared<Recorder>();
  const auto good = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(request_of("bad", std::vector<int32_t>(10, 1), 20), bad, nullptr),
            SubmitResult::kAccepted);
  ASSERT_EQ(engine.submit(request_of("good", {1}, 10), good, nullptr), SubmitResult::kAccepted);
  const GenerateEvent last = bad->wait();
  EXPECT_EQ(last.finish, FinishReason::kError);
  EXPECT_EQ(bad->tokens().size(), 2u);
  EXPECT_STREQ(last.error->what(),
               "the model's logits for the token at position 12 are not finite numbers; only this "
               "request is affected");
  EXPECT_EQ(good->wait().finish, FinishReason::kLength);
  EXPECT_FALSE(engine.failure());
}

TEST(Engine, SeedsAreDrawnWhenAbsent) {
  const EngineOptions options = small_options();
  FakeExecutor executor(options);
  Engine engine(options, executor);
  std::set<std::vector<int32_t>> different;
  for (int i = 0; i < 4; ++i) {
    GenerateRequest request = request_of("a", {1}, 12);
    request.sampling.temperature = 1;
    const auto sink = std::make_shared<Recorder>();
    ASSERT_EQ(engine.submit(request, sink, nullptr), SubmitResult::kAccepted);
    (void)sink->wait();
    different.insert(sink->tokens());
  }
  EXPECT_GT(different.size(), 1u);
}

TEST(Engine, LogprobsComeWithTheTokens) {
  const EngineOptions options = small_options();
  FakeExecutor executor(options);
  Engine engine(options, executor);
  struct Last final : EventSink {
    void on_event(GenerateEvent event) override {
      const std::lock_guard lock(mutex);
      events.push_back(std::move(event));
    }
    std::mutex mutex;
    std::vector<GenerateEvent> events;
  };
  GenerateRequest request = request_of("a", {1}, 3);
  request.sampling.logprobs = 2;
  const auto sink = std::make_shared<Last>();
  ASSERT_EQ(engine.submit(request, sink, nullptr), SubmitResult::kAccepted);
  ASSERT_TRUE(engine.drain(Deadline::in_seconds(10)));
  ASSERT_EQ(sink->events.size(), 3u);
  for (const GenerateEvent& event : sink->events) {
    ASSERT_EQ(event.top.size(), 2u);
    EXPECT_EQ(event.top[0].token, event.token);  // greedy
    EXPECT_EQ(event.top[0].logprob, event.logprob);
    EXPECT_LE(event.top[1].logprob, event.top[0].logprob);
    EXPECT_LT(event.logprob, 0);
  }
}

// Many threads submit and cancel; every accepted request ends exactly once, with a prefix of its
// own tokens.
TEST(Engine, ManyThreadsSubmitAndCancel) {
  EngineOptions options = small_options();
  options.blocks = 40;
  options.max_batch = 6;
  options.max_prefill_tokens = 16;
  options.max_step_tokens = 24;
  FakeExecutor executor(options);
  Engine engine(options, executor);
  const auto requests = mixed_requests(60, 40, 30);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = 0; i < 25; ++i) {
        GenerateRequest request = requests[random() % requests.size()];
        const auto expected = expected_tokens(request, options);
        request.id = std::to_string(t) + "/" + std::to_string(i);
        const std::string id = request.id;
        const auto sink = std::make_shared<Recorder>();
        ASSERT_EQ(engine.submit(std::move(request), sink, nullptr), SubmitResult::kAccepted);
        const bool cancel = random() % 2 == 0;
        if (cancel) {
          if (random() % 2 == 0) sink->wait_for_tokens(1);
          engine.cancel(id);
        }
        const FinishReason reason = sink->wait().finish;
        const auto tokens = sink->tokens();
        ASSERT_LE(tokens.size(), expected.size());
        ASSERT_TRUE(std::equal(tokens.begin(), tokens.end(), expected.begin()));
        if (reason != FinishReason::kCancelled) {
          ASSERT_EQ(tokens.size(), expected.size());
        }
        ASSERT_TRUE(cancel || reason != FinishReason::kCancelled);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(engine.drain(Deadline::in_seconds(10)));
}

}  // namespace
}  // namespace phalanx::engine
