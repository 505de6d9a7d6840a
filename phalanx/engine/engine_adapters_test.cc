// LoRA adapters in the engine: batches of several, the prefix cache, limits, unloading, recovery.

#include <gtest/gtest.h>

#include <future>

#include "phalanx/engine/engine.h"
#include "phalanx/engine/engine_testing.h"

namespace phalanx::engine {
namespace {

EngineOptions adapter_options() {
  EngineOptions options = small_options();
  options.max_adapters = 2;
  options.recover = true;
  return options;
}

std::future<std::optional<Error>> begin_load(Engine& engine, const std::string& name,
                                             const std::string& path) {
  auto answer = std::make_shared<std::promise<std::optional<Error>>>();
  engine.load_adapter(name, path,
                      [answer](const std::optional<Error>& error) { answer->set_value(error); });
  return answer->get_future();
}

std::optional<Error> load(Engine& engine, const std::string& name, const std::string& path) {
  auto future = begin_load(engine, name, path);
  EXPECT_EQ(future.wait_for(std::chrono::seconds(20)), std::future_status::ready);
  return future.get();
}

GenerateRequest with_adapter(GenerateRequest request, const std::string& adapter) {
  request.adapter = adapter;
  return request;
}

// The text of an Error that a call throws.
template <typename Call>
std::string thrown(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing";
}

#define EXPECT_SAYS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST(EngineAdapters, MixedRequestsGiveTheTokensOfEachAlone) {
  // HistoryModel says if a block of one adapter is read with another, or with none.
  std::vector<std::vector<std::vector<int32_t>>> runs;
  for (const bool together : {false, true}) {
    EngineOptions options = adapter_options();
    options.draft_tokens = together ? 4 : 0;  // speculation changes nothing
    if (together) options.blocks = 80;        // some are preempted
    FakeExecutor executor(options);
    Engine engine(options, executor);
    ASSERT_FALSE(load(engine, "a", "a/files"));
    ASSERT_FALSE(load(engine, "b", "b/files"));
    auto requests = mixed_requests(18, 30, 20);
    std::vector<std::vector<int32_t>> tokens;
    std::vector<std::shared_ptr<Recorder>> sinks;
    for (size_t i = 0; i < requests.size(); ++i) {
      // Equal prompts with different adapters.
      requests[i].prompt = requests[i / 3].prompt;
      const char* names[] = {"", "a", "b"};
      sinks.push_back(std::make_shared<Recorder>());
      ASSERT_EQ(engine.submit(with_adapter(requests[i], names[i % 3]), sinks.back(), nullptr),
                SubmitResult::kAccepted);
      if (!together) (void)sinks.back()->wait();
    }
    for (const auto& sink : sinks) {
      EXPECT_NE(sink->wait().finish, FinishReason::kError);
      tokens.push_back(sink->tokens());
    }
    for (size_t i = 0; i < requests.size(); i += 3)
      EXPECT_EQ(tokens[i], expected_tokens(requests[i], options)) << i;
    EXPECT_NE(tokens[0], tokens[1]);
    EXPECT_NE(tokens[1], tokens[2]);
    runs.push_back(tokens);
  }
  EXPECT_EQ(runs[0], runs[1]);
}

TEST(EngineAdapters, ThePrefixCacheKeepsAdaptersApart) {
  const EngineOptions options = adapter_options();
  FakeExecutor executor(options);
  Engine engine(options, executor);
  ASSERT_FALSE(load(engine, "a", "a/files"));
  const std::vector<int32_t> prompt(40, 7);
  const auto cached = [&](const char* id, const std::string& adapter) {
    const auto sink = std::make_shared<Recorder>();
    EXPECT_EQ(engine.submit(with_adapter(request_of(id, prompt, 2), adapter), sink, nullptr),
              SubmitResult::kAccepted);
    return sink->wait().cached_tokens;
  };
  EXPECT_EQ(cached("1", ""), 0);
  EXPECT_EQ(cached("2", "a"), 0);
  EXPECT_EQ(cached("3", "a"), 36);
  EXPECT_EQ(cached("4", ""), 36);
  // Unloaded and loaded again it may be another one.
  engine.unload_adapter("a");
  ASSERT_FALSE(load(engine, "a", "again/files"));
  EXPECT_EQ(cached("5", "a"), 0);
}

TEST(EngineAdapters, RefusalsNameWhatIsWrong) {
  const EngineOptions options = adapter_options();
  FakeExecutor executor(options);
  Engine engine(options, executor);
  const auto missing = load(engine, "a", "missing");
  ASSERT_TRUE(missing);
  EXPECT_STREQ(missing->what(), "rank 0: missing is not there");
  ASSERT_FALSE(load(engine, "a", "a/files"));
  const auto again = [&] { engine.load_adapter("a", "x", nullptr); };
  EXPECT_SAYS(thrown(again), "'a' is loaded already, from a/files. Fix: unload it first");
  ASSERT_FALSE(load(engine, "b", "b/files"));
  EXPECT_SAYS(thrown([&] { engine.load_adapter("c", "x", nullptr); }),
              "all 2 slots are taken (maxLoras) by a, b. Fix");
  EXPECT_SAYS(thrown([&] { engine.unload_adapter("c"); }), "'c' is not loaded");
  EXPECT_SAYS(thrown([&] { engine.load_adapter("c", "", nullptr); }), "has 0 bytes");
  std::string detail;
  EXPECT_EQ(engine.submit(with_adapter(request_of("1", {1}, 2), "c"), std::make_shared<Recorder>(),
                          &detail),
            SubmitResult::kUnknownAdapter);
  EXPECT_EQ(detail, "the LoRA adapter 'c' is not loaded");

  EngineOptions none = options;
  none.max_adapters = 0;
  FakeExecutor second(none);
  Engine without(none, second);
  EXPECT_SAYS(thrown([&] { without.load_adapter("a", "x", nullptr); }), "maxLoras is 0. Fix");
}

TEST(EngineAdapters, UnloadedWhileInUseItStaysForThoseThatUseIt) {
  const EngineOptions options = adapter_options();
  FakeExecutor executor(options);
  Engine engine(options, executor);
  ASSERT_FALSE(load(engine, "a", "a/files"));
  ASSERT_FALSE(load(engine, "b", "b/files"));
  const auto plans = executor.seen().size();
  executor.allow(3);
  const auto sink = std::make_shared<Recorder>();
  ASSERT_EQ(engine.submit(with_adapter(request_of("1", {1, 2}, 30), "a"), sink, nullptr),
            SubmitResult::kAccepted);
  executor.wait_for_plans(plans + 4);
  engine.unload_adapter("a");
  ASSERT_EQ(engine.adapters().size(), 1u);
  EXPECT_EQ(engine.adapters()[0].name, "b");
  EXPECT_EQ(engine.submit(with_adapter(request_of("2", {1}, 2), "a"), std::make_shared<Recorder>(),
                          nullptr),
            SubmitResult::kUnknownAdapter);
  EXPECT_SAYS(thrown([&] { engine.load_adapter("c", "x", nullptr); }),
              "a (unloaded, 1 requests still use it)");
  executor.allow(1 << 20);
  EXPECT_EQ(sink->wait().finish, FinishReason::kLength);
  EXPECT_EQ(sink->tokens().size(), 30u);
  // Its slot is free soon.
  const Deadline deadline = Deadline::in_seconds(10);
  while (thrown([&] { engine.load_adapter("c", "c/files", nullptr); }) != "nothing" &&
         !deadline.passed())
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  while (engine.adapters().size() != 2 && !deadline.passed())
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(engine.adapters().size(), 2u);
}

TEST(EngineAdapters, ANewGenerationHasThemBeforeItComputes) {
  const EngineOptions options = adapter_options();
  FakeExecutor first(options), second(options), third(options);
  third.model.unreadable = "b/files";
  Engine engine(options, first);
  ASSERT_FALSE(load(engine, "a", "a/files"));
  ASSERT_FALSE(load(engine, "b", "b/files"));
  std::vector<std::vector<int32_t>> expected;
  for (const char* name : {"a", "b", ""}) {
    const auto sink = std::make_shared<Recorder>();
    ASSERT_EQ(engine.submit(with_adapter(request_of(name + std::string("0"), {1, 2, 3}, 60), name),
                            sink, nullptr),
              SubmitResult::kAccepted);
    (void)sink->wait();
    expected.push_back(sink->tokens());
  }
  const auto plans = first.seen().size();
  first.allow(4);
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (const char* name : {"a", "b", ""}) {
    sinks.push_back(std::make_shared<Recorder>());
    ASSERT_EQ(engine.submit(with_adapter(request_of(name + std::string("1"), {1, 2, 3}, 60), name),
                            sinks.back(), nullptr),
              SubmitResult::kAccepted);
  }
  first.wait_for_plans(plans + 5);
  engine.unload_adapter("a");  // its request goes on all the same
  first.fail(Error(Code::kUnavailable, "rank 1 was lost"));
  engine.suspend(Deadline::in_seconds(10));
  EXPECT_SAYS(thrown([&] { engine.load_adapter("c", "x", nullptr); }), "a (unloaded, 1 requests");
  second.allow(12);
  engine.resume(second, 2, options.blocks);
  second.wait_for_plans(13);
  second.fail(Error(Code::kUnavailable, "rank 1 was lost again"));
  engine.suspend(Deadline::in_seconds(10));
  EXPECT_EQ(second.seen()[0].kind, StepKind::kAdapter);
  // Now the files of "b" are gone.
  engine.resume(third, 3, options.blocks);
  const GenerateEvent lost = sinks[1]->wait();
  ASSERT_TRUE(lost.error);
  EXPECT_SAYS(std::string(lost.error->what()),
              "the LoRA adapter 'b' could not be read again: rank 0: b/files is not there");
  EXPECT_EQ(sinks[0]->wait().finish, FinishReason::kLength);
  EXPECT_EQ(sinks[2]->wait().finish, FinishReason::kLength);
  EXPECT_EQ(sinks[0]->tokens(), expected[0]);
  EXPECT_EQ(sinks[2]->tokens(), expected[2]);
}

TEST(EngineAdapters, ALoadThatTheEngineDoesNotOutliveIsAnswered) {
  const EngineOptions options = adapter_options();
  FakeExecutor executor(options);
  executor.allow(0);
  std::future<std::optional<Error>> answer;
  {
    Engine engine(options, executor);
    answer = begin_load(engine, "a", "a/files");
    executor.wait_for_plans(1);
    engine.fail(Error(Code::kInternal, "over"));
    const auto error = answer.get();
    ASSERT_TRUE(error);
    EXPECT_STREQ(error->what(), "over");
    EXPECT_SAYS(thrown([&] { engine.load_adapter("b", "x", nullptr); }),
                "the engine has failed: over");
  }
}

}  // namespace
}  // namespace phalanx::engine
