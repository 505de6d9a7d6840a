#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "phalanx/engine/engine.h"
#include "phalanx/engine/engine_testing.h"

namespace phalanx::engine {
namespace {

EngineOptions recovering_options() {
  EngineOptions options = small_options();
  options.recover = true;
  return options;
}

const Error kLost(Code::kUnavailable, "rank 1 was lost");

TEST(EngineRecovery, TokensAreThoseOfAnUndisturbedRun) {
  EngineOptions options = recovering_options();
  options.blocks = 60;  // some wait, some are preempted
  std::vector<std::unique_ptr<FakeExecutor>> generations;
  generations.push_back(std::make_unique<FakeExecutor>(options));
  generations.back()->allow(3);
  Engine engine(options, *generations.back());
  const auto requests = mixed_requests(24, 40, 30);
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (size_t i = 0; i < 12; ++i) {
    sinks.push_back(std::make_shared<Recorder>());
    ASSERT_EQ(engine.submit(requests[i], sinks.back(), nullptr), SubmitResult::kAccepted);
  }
  std::mt19937 random(5);
  int64_t allowed = 3;
  for (uint64_t generation = 2; generation < 12; ++generation) {
    // Lost in the middle of a step, or by word of the control plane.
    generations.back()->wait_for_plans(static_cast<size_t>(allowed) + 1);
    generations.back()->fail(kLost);
    engine.suspend(Deadline::in_seconds(10));
    if (generation == 3) {
      for (size_t i = 12; i < requests.size(); ++i) {  // accepted, and wait
        sinks.push_back(std::make_shared<Recorder>());
        ASSERT_EQ(engine.submit(requests[i], sinks.back(), nullptr), SubmitResult::kAccepted);
      }
    }
    generations.push_back(std::make_unique<FakeExecutor>(options));
    allowed = generation == 11 ? 1 << 20 : 1 + static_cast<int64_t>(random() % 8);
    generations.back()->allow(allowed);
    engine.resume(*generations.back(), generation, options.blocks);
  }
  for (size_t i = 0; i < requests.size(); ++i) {
    const GenerateEvent last = sinks[i]->wait();
    EXPECT_NE(last.finish, FinishReason::kError);
    EXPECT_EQ(sinks[i]->tokens(), expected_tokens(requests[i], options)) << i;
  }
  const Deadline told = Deadline::in_seconds(20);  // counted after the last event
  while (engine.stats().succeeded != requests.size() && !told.passed()) std::this_thread::yield();
  EXPECT_EQ(engine.stats().succeeded, requests.size());
}

TEST(EngineRecovery, TheLossIsReportedOnceAndLeavesRequestsAlone) {
  const EngineOptions options = recovering_options();
  FakeExecutor executor(options), successor(options);
  executor.allow(2);
  Engine engine(options, executor);
  std::atomic<int> calls{0};
  engine.on_failure([&](const Error& error) {
    EXPECT_STREQ(error.what(), kLost.what());
    ++calls;
  });
  const auto sink = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(request_of("a", {1}, 20), sink, nullptr), SubmitResult::kAccepted);
  executor.wait_for_plans(3);
  executor.fail(kLost);
  for (int i = 0; i < 1000 && calls == 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  engine.suspend(Deadline::in_seconds(10));
  EXPECT_EQ(calls, 1);
  EXPECT_FALSE(sink->ended());
  EXPECT_FALSE(engine.failure());
  engine.resume(successor, 2, options.blocks);
  EXPECT_EQ(sink->wait().finish, FinishReason::kLength);
  EXPECT_EQ(successor.seen().front().prefill_tokens, 3);  // the prompt and two accepted tokens
}

TEST(EngineRecovery, SuspendedRequestsCanBeCancelledAndEnded) {
  const EngineOptions options = recovering_options();
  FakeExecutor executor(options);
  executor.allow(1);
  Engine engine(options, executor);
  const auto a = std::make_shared<Recorder>();
  const auto b = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(request_of("a", {1}, 20), a, nullptr), SubmitResult::kAccepted);
  executor.wait_for_plans(2);
  executor.fail(kLost);
  engine.suspend(Deadline::in_seconds(10));
  ASSERT_EQ(engine.submit(request_of("b", {1}, 20), b, nullptr), SubmitResult::kAccepted);
  engine.cancel("a");
  EXPECT_EQ(a->wait().finish, FinishReason::kCancelled);
  EXPECT_FALSE(b->ended());
  engine.fail(Error(Code::kUnavailable, "nobody returned"));
  EXPECT_STREQ(b->wait().error->what(), "nobody returned");
}

TEST(EngineRecovery, AnIdleEngineIsSuspendedToo) {
  const EngineOptions options = recovering_options();
  FakeExecutor executor(options), successor(options);
  Engine engine(options, executor);
  engine.suspend(Deadline::in_seconds(10));
  engine.resume(successor, 2, options.blocks);
  const auto sink = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(request_of("a", {1}, 3), sink, nullptr), SubmitResult::kAccepted);
  EXPECT_EQ(sink->wait().finish, FinishReason::kLength);
  EXPECT_TRUE(executor.seen().empty());
}

TEST(EngineRecovery, ASmallerCacheEndsOnlyWhatItCannotHold) {
  const EngineOptions options = recovering_options();
  FakeExecutor executor(options);
  executor.allow(1);
  Engine engine(options, executor);
  const auto large = std::make_shared<Recorder>();
  const auto small = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(request_of("a", {1}, 50), large, nullptr), SubmitResult::kAccepted);
  ASSERT_EQ(engine.submit(request_of("b", {1}, 8), small, nullptr), SubmitResult::kAccepted);
  executor.wait_for_plans(2);
  executor.fail(kLost);
  engine.suspend(Deadline::in_seconds(10));
  EngineOptions less = options;
  less.blocks = 5;
  FakeExecutor successor(less);
  engine.resume(successor, 2, less.blocks);
  const GenerateEvent last = large->wait();
  EXPECT_EQ(last.error->code(), Code::kResourceExhausted);
  EXPECT_STREQ(last.error->what(),
               "after a recovery the KV cache holds 20 tokens, this request may need 50");
  EXPECT_EQ(small->wait().finish, FinishReason::kLength);
}

}  // namespace
}  // namespace phalanx::engine
