#include <gtest/gtest.h>

#include <numeric>
#include <thread>

#include "phalanx/engine/engine_testing.h"

// What sequences find computed, give up and compute again. HistoryModel reads every token back from
// its slot, so a shared block with other content changes tokens or is reported.

namespace phalanx::engine {
namespace {

std::vector<int32_t> counting(int32_t from, int32_t count) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  std::iota(tokens.begin(), tokens.end(), from);
  for (int32_t& token : tokens) token %= static_cast<int32_t>(kHistoryVocab);
  return tokens;
}

int64_t prefill_tokens(FakeExecutor& executor) {
  int64_t sum = 0;
  for (const Seen& seen : executor.seen()) sum += seen.prefill_tokens;
  return sum;
}

TEST(PrefixCache, ASecondRequestComputesOnlyWhatIsNew) {
  EngineOptions options = small_options();
  FakeExecutor executor(options);
  Engine engine(options, executor);
  const auto ask = [&](std::string id, std::vector<int32_t> prompt) {
    const GenerateRequest request = request_of(std::move(id), std::move(prompt), 6);
    const auto sink = std::make_shared<Recorder>();
    EXPECT_EQ(engine.submit(request, sink, nullptr), SubmitResult::kAccepted);
    const int32_t cached = sink->wait().cached_tokens;
    EXPECT_EQ(sink->tokens(), expected_tokens(request, options));
    return cached;
  };
  std::vector<int32_t> prompt = counting(3, 41);
  EXPECT_EQ(ask("a", prompt), 0);
  EXPECT_EQ(prefill_tokens(executor), 41);
  EXPECT_EQ(ask("b", prompt), 40);
  EXPECT_EQ(prefill_tokens(executor), 41 + 0);  // its one token counts as decoding
  prompt.resize(40);
  EXPECT_EQ(ask("the last token is computed", prompt), 36);
  prompt.push_back(96);
  EXPECT_EQ(ask("c", prompt), 40);
  prompt[0] = 90;
  EXPECT_EQ(ask("another beginning", prompt), 0);
  EXPECT_EQ(engine.stats().cached_tokens, 40u + 36 + 40);
}

TEST(PrefixCache, AnAnswerIsKnownToTheNextTurn) {
  const EngineOptions options = small_options();
  FakeExecutor executor(options);
  Engine engine(options, executor);
  GenerateRequest first = request_of("a", counting(3, 10), 21);
  const auto sink = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(first, sink, nullptr), SubmitResult::kAccepted);
  (void)sink->wait();
  // 10 + 21 tokens, the last of which was never computed: 30 in 7 full blocks of 4.
  std::vector<int32_t> conversation = first.prompt;
  for (const int32_t token : sink->tokens()) conversation.push_back(token);
  conversation.push_back(1);
  const GenerateRequest second = request_of("b", conversation, 3);
  const auto next = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(second, next, nullptr), SubmitResult::kAccepted);
  EXPECT_EQ(next->wait().cached_tokens, 28);
  EXPECT_EQ(next->tokens(), expected_tokens(second, options));
}

TEST(PrefixCache, OffMeansEverythingIsComputed) {
  EngineOptions options = small_options();
  options.prefix_cache = false;
  FakeExecutor executor(options);
  Engine engine(options, executor);
  for (const char* id : {"a", "b"}) {
    const auto sink = std::make_shared<Recorder>();
    ASSERT_EQ(engine.submit(request_of(id, counting(3, 41), 2), sink, nullptr),
              SubmitResult::kAccepted);
    EXPECT_EQ(sink->wait().cached_tokens, 0);
  }
  EXPECT_EQ(prefill_tokens(executor), 82);
}

// Many with common beginnings at once, in a cache so small that content is thrown out and running
// sequences are preempted all the time.
TEST(PrefixCache, ATinyCacheChangesNoToken) {
  EngineOptions options = small_options();
  options.blocks = 34;
  options.max_sequence = 130;
  options.max_batch = 12;
  std::vector<GenerateRequest> requests = mixed_requests(64, 60, 60);
  for (size_t i = 0; i < requests.size(); ++i) {
    requests[i].sampling.seed = i;
    std::vector<int32_t> prompt = counting(static_cast<int32_t>(i % 3) * 20, 17);
    prompt.insert(prompt.end(), requests[i].prompt.begin(), requests[i].prompt.end());
    requests[i].prompt = prompt;
  }
  FakeExecutor executor(options);
  Engine engine(options, executor);
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (const GenerateRequest& request : requests) {
    sinks.push_back(std::make_shared<Recorder>());
    ASSERT_EQ(engine.submit(request, sinks.back(), nullptr), SubmitResult::kAccepted);
  }
  for (size_t i = 0; i < requests.size(); ++i) {
    (void)sinks[i]->wait();
    EXPECT_EQ(sinks[i]->tokens(), expected_tokens(requests[i], options)) << requests[i].id;
  }
  EngineStats stats = engine.stats();
  EXPECT_GT(stats.preemptions, 0u);
  EXPECT_GT(stats.cached_tokens, 0u);
  while (engine.stats().succeeded < 64) std::this_thread::yield();
  EXPECT_EQ(engine.stats().blocks_free, options.blocks);
}

// Steps of 1 ms, of which a prompt token takes 100 us: beside sequences that decode a step takes
// few of them; a burst that came before is computed at full speed.
TEST(Pace, PromptsBesideRunningSequencesComeInSmallShares) {
  EngineOptions options = small_options();
  options.max_prefill_tokens = options.max_step_tokens = 96;
  options.max_batch = 8;
  FakeExecutor executor(options);
  executor.step_ns = [](const Seen& seen) { return 1'000'000 + 100'000 * seen.prefill_tokens; };
  executor.allow(12);
  Engine engine(options, executor);
  const auto first = std::make_shared<Recorder>();
  const auto late = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(request_of("running", counting(0, 90), 100), first, nullptr),
            SubmitResult::kAccepted);
  executor.wait_for_plans(13);
  ASSERT_EQ(engine.submit(request_of("late", counting(9, 90), 2), late, nullptr),
            SubmitResult::kAccepted);
  executor.allow(1000);
  (void)late->wait();
  int64_t most = 0;
  const auto seen = executor.seen();
  EXPECT_EQ(seen[0].prefill_tokens, 90);
  for (size_t i = 1; i < seen.size(); ++i) most = std::max(most, seen[i].prefill_tokens);
  EXPECT_LE(most, 20);
  EXPECT_GE(most, PrefillPace::kLeast);
  EXPECT_EQ(late->tokens(), expected_tokens(request_of("late", counting(9, 90), 2), options));
}

}  // namespace
}  // namespace phalanx::engine
