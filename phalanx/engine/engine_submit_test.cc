#include "phalanx/engine/engine.h"

#include <gtest/gtest.h>

#include "phalanx/engine/engine_testing.h"

namespace phalanx::engine {
namespace {

TEST(Engine, RefusalsTellTheNumbers) {
  EngineOptions options = small_options();
  options.max_input_tokens = 190;
  options.max_sequence = 180;
  options.blocks = 30;
  FakeExecutor executor(options);
  Engine engine(options, executor);
  const auto refuse = [&](GenerateRequest request, SubmitResult result, const char* text) {
    std::string detail;
    EXPECT_EQ(engine.submit(std::move(request), std::make_shared<Recorder>(), &detail), result);
    EXPECT_EQ(detail, text);
  };
  refuse(request_of("a", {}, 1), SubmitResult::kBadParameter,
         "the prompt has 0 tokens, at least 1 is needed");
  refuse(request_of("a", std::vector<int32_t>(191, 1), 1), SubmitResult::kPromptTooLong,
         "the prompt has 191 tokens, at most 190 are allowed (maxInputTokenLen)");
  refuse(request_of("a", std::vector<int32_t>(180, 1), 1), SubmitResult::kPromptTooLong,
         "the prompt has 180 tokens, at most 179 leave room for one more in a sequence of 180 "
         "(maxSeqLen)");
  refuse(request_of("a", std::vector<int32_t>(121, 1), 1), SubmitResult::kPromptTooLong,
         "the prompt has 121 tokens, the whole KV cache holds 120 (30 blocks of 4)");
  refuse(request_of("a", {5, 97}, 1), SubmitResult::kBadToken,
         "token 1 of the prompt is 97, the vocabulary has ids 0 to 96");
  refuse(request_of("a", {-1}, 1), SubmitResult::kBadToken,
         "token 0 of the prompt is -1, the vocabulary has ids 0 to 96");
  refuse(request_of("a", {1}, 0), SubmitResult::kBadParameter,
         "max_tokens is 0, expected 1 or more");
  GenerateRequest odd = request_of("a", {1}, 1);
  odd.sampling.temperature = std::numeric_limits<float>::quiet_NaN();
  refuse(odd, SubmitResult::kBadParameter, "temperature is nan, expected a number of 0 or more");
  odd = request_of("a", {1}, 1);
  odd.sampling.top_p = 0;
  refuse(odd, SubmitResult::kBadParameter, "top_p is 0, expected more than 0, at most 1");
  EXPECT_EQ(engine.stats().received, 0u);
}

TEST(Engine, OutputEndsWhereSequenceOrCacheEnd) {
  EngineOptions options = small_options();
  options.max_sequence = 50;
  options.max_output_tokens = 20;
  options.blocks = 8;  // 32 slots
  FakeExecutor executor(options);
  Engine engine(options, executor);
  const auto run = [&](size_t prompt, int32_t max_tokens) {
    const auto sink = std::make_shared<Recorder>();
    EXPECT_EQ(engine.submit(request_of("a", std::vector<int32_t>(prompt, 1), max_tokens), sink,
                            nullptr),
              SubmitResult::kAccepted);
    EXPECT_EQ(sink->wait().finish, FinishReason::kLength);
    return sink->tokens().size();
  };
  EXPECT_EQ(run(4, 7), 7u);
  EXPECT_EQ(run(4, 100), 20u);
  EXPECT_EQ(run(25, 100), 8u);  // the last of 33 tokens needs no slot
  EXPECT_EQ(run(32, 100), 1u);
}

TEST(Engine, BadOptionsAreAllNamed) {
  EngineOptions options = small_options();
  options.blocks = 0;
  options.max_step_tokens = 31;
  FakeExecutor executor(small_options());
  try {
    Engine engine(options, executor);
    FAIL();
  } catch (const Error& error) {
    const std::string text = error.what();
    EXPECT_EQ(error.code(), Code::kInvalidArgument);
    EXPECT_NE(text.find("blocks is out of range, found 0, expected at least 1"), std::string::npos)
        << text;
    EXPECT_NE(text.find("max_step_tokens is out of range, found 31, expected at least 32"),
              std::string::npos)
        << text;
  }
}

TEST(Engine, DuplicatesAndFullQueueAreRefused) {
  EngineOptions options = small_options();
  options.max_batch = 1;
  options.max_queue = 2;
  FakeExecutor executor(options);
  executor.allow(0);
  Engine engine(options, executor);
  std::vector<std::shared_ptr<Recorder>> sinks;
  const auto submit = [&](const char* id, std::string* detail) {
    sinks.push_back(std::make_shared<Recorder>());
    return engine.submit(request_of(id, {1}, 1), sinks.back(), detail);
  };
  std::string detail;
  EXPECT_EQ(submit("a", &detail), SubmitResult::kAccepted);
  executor.wait_for_plans(1);
  // The plan is out a moment before the queue is counted without it.
  for (int i = 0; i < 2000 && engine.stats().running == 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  EXPECT_EQ(submit("a", &detail), SubmitResult::kDuplicateId);
  EXPECT_EQ(detail, "a request with the id 'a' is still running");
  EXPECT_EQ(submit("b", &detail), SubmitResult::kAccepted);
  EXPECT_EQ(submit("c", &detail), SubmitResult::kAccepted);
  EXPECT_EQ(submit("d", &detail), SubmitResult::kQueueFull);
  EXPECT_EQ(detail, "2 requests are waiting, at most 2 may");
  executor.allow(1000);
  (void)sinks[0]->wait();
  (void)sinks[3]->wait();
  // An id is free again when its final event has been made.
  EXPECT_EQ(submit("a", &detail), SubmitResult::kAccepted);
  (void)sinks.back()->wait();
}

}  // namespace
}  // namespace phalanx::engine
