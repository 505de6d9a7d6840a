#include "phalanx/engine/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <limits>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <thread>

#include "phalanx/engine/history_model.h"
#include "phalanx/engine/sampler.h"

namespace phalanx::engine {
namespace {

EngineOptions small_options() {
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

StepLimits limits_of(const EngineOptions& o) {
  return {.max_tokens = o.max_step_tokens,
          .max_rows = o.max_batch,
          .max_sequence = o.max_sequence,
          .blocks = o.blocks,
          .block_size = o.block_size,
          .vocab_size = o.vocab_size};
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
      : limits_(limits_of(options)), model(options.blocks, options.block_size) {
    logits_.resize(static_cast<size_t>(limits_.max_rows * limits_.vocab_size));
  }

  void send(std::span<const std::byte> plan) override {
    buffer_.assign(plan.begin(), plan.end());
    view_.decode(buffer_, limits_);
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
    if (timing != nullptr) *timing = {.total_ns = 1000, .compute_ns = 900, .communication_ns = 100};
    return std::span<const float>(logits_).first(view_.header().num_rows *
                                                 static_cast<size_t>(kHistoryVocab));
  }

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
  const StepLimits limits_;
  std::vector<std::byte> buffer_;
  StepPlanView view_;
  std::vector<float> logits_;
  uint64_t steps_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Seen> seen_;
  int64_t allowed_ = std::numeric_limits<int64_t>::max();
  std::string abort_reason_;
  std::optional<Error> error_;

 public:
  HistoryModel model;  // engine thread
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
std::vector<int32_t> expected_tokens(const GenerateRequest& request, const EngineOptions& o) {
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

GenerateRequest request_of(std::string id, std::vector<int32_t> prompt, int32_t max_tokens) {
  GenerateRequest request{.id = std::move(id), .prompt = std::move(prompt)};
  request.sampling.temperature = 0;
  request.sampling.max_tokens = max_tokens;
  return request;
}

// Prompts of 1 to max_prompt tokens, all ways of sampling.
std::vector<GenerateRequest> mixed_requests(int count, int max_prompt, int max_tokens) {
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
