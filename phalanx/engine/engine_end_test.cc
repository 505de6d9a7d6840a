#include "phalanx/engine/engine.h"

#include <gtest/gtest.h>

#include <thread>

#include "phalanx/engine/engine_testing.h"

namespace phalanx::engine {
namespace {

TEST(Engine, CancelInEveryState) {
  EngineOptions options = small_options();
  options.max_batch = 2;
  options.max_prefill_tokens = 4;
  FakeExecutor executor(options);
  executor.allow(0);
  Engine engine(options, executor);
  const auto decoding = std::make_shared<Recorder>();
  const auto prefilling = std::make_shared<Recorder>();
  const auto waiting = std::make_shared<Recorder>();
  const auto kept = std::make_shared<Recorder>();
  engine.cancel("nobody");
  ASSERT_EQ(engine.submit(request_of("decoding", {1, 2}, 90), decoding, nullptr),
            SubmitResult::kAccepted);
  executor.allow(3);
  decoding->wait_for_tokens(2);
  ASSERT_EQ(engine.submit(request_of("prefilling", std::vector<int32_t>(60, 2), 90), prefilling,
                          nullptr),
            SubmitResult::kAccepted);
  ASSERT_EQ(engine.submit(request_of("waiting", {1}, 9), waiting, nullptr),
            SubmitResult::kAccepted);
  ASSERT_EQ(engine.submit(request_of("kept", {8, 9}, 5), kept, nullptr), SubmitResult::kAccepted);
  const size_t plans = executor.seen().size();
  executor.allow(2);
  executor.wait_for_plans(plans + 2);
  engine.cancel("prefilling");
  engine.cancel("waiting");
  engine.cancel("decoding");
  engine.cancel("decoding");
  executor.allow(1000);
  EXPECT_EQ(decoding->wait().finish, FinishReason::kCancelled);
  EXPECT_EQ(prefilling->wait().finish, FinishReason::kCancelled);
  EXPECT_TRUE(prefilling->tokens().empty());
  EXPECT_EQ(waiting->wait().finish, FinishReason::kCancelled);
  EXPECT_EQ(kept->wait().finish, FinishReason::kLength);
  EXPECT_EQ(kept->tokens(), expected_tokens(request_of("kept", {8, 9}, 5), options));
  engine.cancel("kept");  // finished
  EXPECT_TRUE(engine.drain(Deadline::in_seconds(10)));
  while (engine.stats().succeeded == 0) std::this_thread::yield();
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.cancelled, 3u);
  EXPECT_EQ(stats.succeeded, 1u);
  EXPECT_EQ(stats.blocks_free, options.blocks);
}

TEST(Engine, CancelRightAfterSubmit) {
  const EngineOptions options = small_options();
  FakeExecutor executor(options);
  Engine engine(options, executor);
  for (int i = 0; i < 200; ++i) {
    const auto sink = std::make_shared<Recorder>();
    ASSERT_EQ(engine.submit(request_of("a", {1, 2, 3}, 50), sink, nullptr),
              SubmitResult::kAccepted);
    engine.cancel("a");
    const FinishReason reason = sink->wait().finish;
    EXPECT_TRUE(reason == FinishReason::kCancelled || reason == FinishReason::kLength);
  }
}

TEST(Engine, DrainLetsRequestsEnd) {
  const EngineOptions options = small_options();
  FakeExecutor executor(options);
  executor.allow(0);
  Engine engine(options, executor);
  const auto sink = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(request_of("a", {1}, 20), sink, nullptr), SubmitResult::kAccepted);
  EXPECT_FALSE(engine.drain(Deadline::in_seconds(0.02)));
  std::string detail;
  EXPECT_EQ(engine.submit(request_of("b", {1}, 20), sink, &detail), SubmitResult::kStopped);
  EXPECT_EQ(detail, "the engine is being stopped and takes no new requests");
  executor.allow(1000);
  EXPECT_TRUE(engine.drain(Deadline::in_seconds(10)));
  EXPECT_TRUE(sink->ended());
  EXPECT_EQ(sink->tokens().size(), 20u);
}

TEST(Engine, FailEndsAllAtOnce) {
  EngineOptions options = small_options();
  options.max_batch = 1;
  FakeExecutor executor(options);
  executor.allow(2);
  Engine engine(options, executor);
  bool called = false;
  engine.on_failure([&](const Error&) { called = true; });
  const auto running = std::make_shared<Recorder>();
  const auto waiting = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(request_of("a", {1}, 20), running, nullptr), SubmitResult::kAccepted);
  ASSERT_EQ(engine.submit(request_of("b", {1}, 20), waiting, nullptr), SubmitResult::kAccepted);
  executor.wait_for_plans(3);
  engine.fail(Error(Code::kUnavailable, "node 10.0.0.3 was lost"));
  engine.fail(Error(Code::kUnavailable, "a later reason"));
  for (const auto& sink : {running, waiting}) {
    const GenerateEvent last = sink->wait();
    EXPECT_EQ(last.finish, FinishReason::kError);
    ASSERT_TRUE(last.error.has_value());
    EXPECT_STREQ(last.error->what(), "node 10.0.0.3 was lost");
  }
  EXPECT_EQ(executor.abort_reason(), "node 10.0.0.3 was lost");
  EXPECT_STREQ(engine.failure()->what(), "node 10.0.0.3 was lost");
  std::string detail;
  EXPECT_EQ(engine.submit(request_of("c", {1}, 1), running, &detail), SubmitResult::kStopped);
  EXPECT_EQ(detail, "the engine has failed: node 10.0.0.3 was lost");
  EXPECT_TRUE(engine.drain(Deadline::in_seconds(5)));
  EXPECT_FALSE(called);  // it did not fail by itself
}

TEST(Engine, EndRequestsLeavesTheExecutorInOrder) {
  const EngineOptions options = small_options();
  FakeExecutor executor(options);
  executor.allow(2);
  Engine engine(options, executor);
  const auto sink = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(request_of("a", {1}, 20), sink, nullptr), SubmitResult::kAccepted);
  executor.wait_for_plans(3);
  engine.end_requests(Error(Code::kUnavailable, "the service is stopping"));
  executor.allow(1);  // the step being computed ends first
  const GenerateEvent last = sink->wait();
  EXPECT_EQ(last.finish, FinishReason::kError);
  EXPECT_STREQ(last.error->what(), "the service is stopping");
  EXPECT_EQ(executor.abort_reason(), "");
  EXPECT_EQ(engine.submit(request_of("b", {1}, 1), sink, nullptr), SubmitResult::kStopped);
}

TEST(Engine, AFailedStepEndsAllAndIsReported) {
  const EngineOptions options = small_options();
  FakeExecutor executor(options);
  executor.allow(2);
  Engine engine(options, executor);
  std::atomic<int> calls{0};
  const auto sink = std::make_shared<Recorder>();
  engine.on_failure([&](const Error& error) {
    EXPECT_STREQ(error.what(), "rank 1 on host b was lost");
    EXPECT_TRUE(sink->ended());
    ++calls;
  });
  ASSERT_EQ(engine.submit(request_of("a", {1}, 20), sink, nullptr), SubmitResult::kAccepted);
  executor.wait_for_plans(3);
  executor.fail(Error(Code::kUnavailable, "rank 1 on host b was lost"));
  const GenerateEvent last = sink->wait();
  EXPECT_EQ(last.finish, FinishReason::kError);
  EXPECT_STREQ(last.error->what(), "rank 1 on host b was lost");
  EXPECT_EQ(last.output_tokens, 2);
  for (int i = 0; i < 1000 && calls == 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(engine.failure()->code(), Code::kUnavailable);
}

TEST(Engine, AStepWithoutAnswerFails) {
  EngineOptions options = small_options();
  options.step_seconds = 0.05;
  FakeExecutor executor(options);
  executor.allow(0);
  Engine engine(options, executor);
  const auto sink = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(request_of("a", {1}, 20), sink, nullptr), SubmitResult::kAccepted);
  EXPECT_EQ(sink->wait().error->code(), Code::kDeadlineExceeded);
  EXPECT_EQ(executor.abort_reason(), "the step took too long");
}

TEST(Engine, DestructionEndsRunningRequests) {
  const EngineOptions options = small_options();
  FakeExecutor executor(options);
  std::vector<std::shared_ptr<Recorder>> sinks;
  {
    Engine engine(options, executor);
    for (int i = 0; i < 80; ++i) {
      sinks.push_back(std::make_shared<Recorder>());
      ASSERT_EQ(engine.submit(request_of(std::to_string(i), {i % 90, 2}, 90), sinks.back(),
                              nullptr),
                SubmitResult::kAccepted);
    }
  }
  for (const auto& sink : sinks) {
    ASSERT_TRUE(sink->ended());
    const FinishReason reason = sink->wait().finish;
    EXPECT_TRUE(reason == FinishReason::kCancelled || reason == FinishReason::kLength);
  }
  EXPECT_EQ(executor.abort_reason(), "");
}

TEST(Engine, DestructionDoesNotWaitForAStuckStep) {
  const EngineOptions options = small_options();
  FakeExecutor executor(options);
  executor.allow(0);
  const auto sink = std::make_shared<Recorder>();
  const int64_t begin = now_ns();
  {
    Engine engine(options, executor);
    ASSERT_EQ(engine.submit(request_of("a", {1}, 20), sink, nullptr), SubmitResult::kAccepted);
    executor.wait_for_plans(1);
  }
  EXPECT_LT(now_ns() - begin, 4'000'000'000);
  EXPECT_EQ(sink->wait().finish, FinishReason::kCancelled);
  EXPECT_EQ(executor.abort_reason(), "the engine stopped while a step was being computed");
}

}  // namespace
}  // namespace phalanx::engine
