#include "phalanx/engine/worker.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <future>
#include <iterator>
#include <map>
#include <thread>

#include "phalanx/comm/test_ranks.h"
#include "phalanx/engine/engine.h"
#include "phalanx/engine/history_model.h"

namespace phalanx::engine {
namespace {

constexpr uint64_t kGeneration = 7;
constexpr StepLimits kLimits{.max_tokens = 600,
                             .max_rows = 16,
                             .max_sequence = 700,
                             .blocks = 200,
                             .block_size = 8,
                             .vocab_size = kHistoryVocab,
                             .ranks = 3,
                             .max_adapters = 2};

EngineOptions engine_options() {
  return {.vocab_size = kHistoryVocab,
          .block_size = kLimits.block_size,
          .blocks = kLimits.blocks,
          .max_sequence = kLimits.max_sequence,
          .max_input_tokens = 600,
          .max_prefill_tokens = 500,
          .max_prefill_batch = 8,
          .max_batch = kLimits.max_rows,
          .max_output_tokens = 100,
          .max_step_tokens = kLimits.max_tokens,
          .max_adapters = kLimits.max_adapters,
          .rank_places = {"rank 0 (node A)", "rank 1 (node B)"},
          .generation = kGeneration,
          .step_seconds = 20};
}

struct Answer final : EventSink {
  void on_event(GenerateEvent event) override {
    const std::lock_guard lock(mutex);
    if (event.token >= 0) tokens.push_back(event.token);
    if (event.finish != FinishReason::kNone) last = std::move(event);
  }
  std::mutex mutex;
  std::vector<int32_t> tokens;
  GenerateEvent last;
};

// Rank threads around a channel, as a supervisor would have processes.
class Ranks {
 public:
  explicit Ranks(std::vector<int> node_of, std::string logits_folder = "",
                 const StepLimits& limits = kLimits)
      : limits_(limits), ranks_(node_of), pages(node_of.size()), errors(node_of.size()) {
    options_ = {.generation = kGeneration,
                .limits = limits,
                .idle_seconds = 20,
                .logits_folder = std::move(logits_folder)};
  }
  ~Ranks() {
    for (std::thread& thread : threads_) thread.join();
  }
  // adjust: called on each rank's thread before its loop.
  void start(const std::function<void(comm::Group&, HistoryModel&)>& adjust = nullptr) {
    for (int rank = 0; rank < ranks_.size(); ++rank) {
      threads_.emplace_back([this, rank, adjust] {
        try {
          const auto formed = ranks_.form(rank);
          const auto group = std::make_unique<comm::TracedGroup>(*formed);
          HistoryModel model(kLimits.blocks, kLimits.block_size);
          model.on_forward = [&](const models::StepInputs&, float*) { group->barrier(); };
          if (adjust) adjust(*group, model);
          std::optional<StepChannelRank> channel;
          if (rank == 0) channel.emplace(memory_.get(), limits_);
          HistoryModel draft(kLimits.blocks, kLimits.block_size);
          std::optional<Drafter> drafter;
          if (rank == 0 && limits_.draft_sequences > 0) drafter.emplace(draft, limits_);
          run_worker(options_, model, *group, channel ? &*channel : nullptr,
                     &pages[static_cast<size_t>(rank)], drafter ? &*drafter : nullptr);
        } catch (const std::exception& error) {
          errors[static_cast<size_t>(rank)] = error.what();
        }
      });
    }
  }
  void join() {
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }
  void stop() {
    StepPlanWriter writer;
    writer.begin(StepKind::kStop, kGeneration, 0);
    head.send(writer.finish());
    (void)head.wait_logits(Deadline::in_seconds(10), nullptr);
    join();
  }

 private:
  const StepLimits limits_;
  comm::TestRanks ranks_;
  UniqueFd memory_ = create_step_channel(limits_);
  WorkerOptions options_;
  std::vector<std::thread> threads_;

 public:
  StepChannelHead head{memory_.get(), limits_};
  std::vector<RankPage> pages;
  std::vector<std::string> errors;
};

GenerateRequest request_of(int number, size_t prompt, int32_t max_tokens) {
  GenerateRequest request{.id = std::to_string(number)};
  for (size_t i = 0; i < prompt; ++i) {
    request.prompt.push_back(static_cast<int32_t>((i * 7 + static_cast<size_t>(number)) % 97));
  }
  request.sampling.temperature = number % 2 == 0 ? 0.0f : 1.0f;
  request.sampling.seed = 5;
  request.sampling.max_tokens = max_tokens;
  return request;
}

// Runs requests; the first one has a plan larger than the first piece.
std::vector<std::vector<int32_t>> answers(Ranks& ranks, bool together,
                                          const EngineOptions& options = engine_options(),
                                          EngineStats* stats = nullptr) {
  ChannelExecutor executor(ranks.head);
  Engine engine(options, executor);
  std::vector<std::shared_ptr<Answer>> sinks;
  for (int i = 0; i < 6; ++i) {
    sinks.push_back(std::make_shared<Answer>());
    EXPECT_EQ(engine.submit(request_of(i, i == 0 ? 590 : 3 + static_cast<size_t>(i), 12),
                            sinks.back(), nullptr),
              SubmitResult::kAccepted);
    if (together) continue;
    for (int k = 0; k < 5000 && engine.stats().succeeded <= static_cast<uint64_t>(i); ++k) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  EXPECT_TRUE(engine.drain(Deadline::in_seconds(20)));
  std::vector<std::vector<int32_t>> tokens;
  for (const auto& sink : sinks) {
    EXPECT_EQ(sink->last.finish, FinishReason::kLength);
    tokens.push_back(sink->tokens);
  }
  if (stats != nullptr) *stats = engine.stats();
  return tokens;
}

std::map<std::string, std::string> files_of(const std::filesystem::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    std::ifstream in(entry.path(), std::ios::binary);
    files[entry.path().filename()] = std::string(std::istreambuf_iterator<char>(in), {});
  }
  return files;
}

TEST(Worker, TokensAndLogitsFilesAreTheSameForAnyRanksAndBatch) {
  const auto base = std::filesystem::temp_directory_path() /
                    ("phalanx-worker-test-" + std::to_string(::getpid()));
  std::optional<std::vector<std::vector<int32_t>>> expected;
  std::optional<std::map<std::string, std::string>> expected_files;
  int run = 0;
  const std::vector<std::vector<int>> layouts{{0}, {0, 0}, {0, 1, 1}};
  for (const auto& layout : layouts) {
    for (const bool together : {false, true}) {
      const auto folder = base / std::to_string(run++) / "logits";
      Ranks ranks(layout, folder);
      ranks.start();
      const auto tokens = answers(ranks, together);
      ranks.stop();
      for (const std::string& error : ranks.errors) EXPECT_EQ(error, "");
      const auto files = files_of(folder);
      if (!expected) {
        expected = tokens;
        expected_files = files;
      }
      EXPECT_EQ(tokens, *expected);
      EXPECT_EQ(files, *expected_files);
      EXPECT_EQ(files.size(), 6u);
      EXPECT_EQ(files.at("seq0.f32").size(), 12u * kHistoryVocab * sizeof(float));
      for (const RankPage& page : ranks.pages) {
        EXPECT_EQ(page.generation.load(), kGeneration);
        EXPECT_EQ(page.tokens_done.load(), 590u + 4 + 5 + 6 + 7 + 8 + 6 * 11);
        EXPECT_EQ(page.steps_done.load(), page.heartbeat.load());
        EXPECT_GT(page.compute_ns.load(), 0u);
        if (layout.size() > 1) {
          EXPECT_GT(page.bytes_sent.load() + page.bytes_received.load() + page.bytes_shared.load(),
                    0u);
        }
      }
    }
  }
  std::filesystem::remove_all(base);
}

// The answer to a load; nullopt: it may be used.
std::optional<Error> load(Engine& engine, const std::string& name, const std::string& path) {
  std::promise<std::optional<Error>> answer;
  engine.load_adapter(name, path, [&](const std::optional<Error>& error) { answer.set_value(error); });
  auto future = answer.get_future();
  EXPECT_EQ(future.wait_for(std::chrono::seconds(20)), std::future_status::ready);
  return future.get();
}

TEST(Worker, AdaptersAreTakenByAllRanksOrByNone) {
  Ranks ranks({0, 1, 1});
  ranks.start([](comm::Group& group, HistoryModel& model) {
    if (group.rank() != 1) return;
    model.unreadable = "only/on/others";
    model.on_forward = [&group](const models::StepInputs&, float*) { group.barrier(); };
  });
  {
    ChannelExecutor executor(ranks.head);
    Engine engine(engine_options(), executor);
    EXPECT_FALSE(load(engine, "one", "/adapters/one"));
    const auto refused = load(engine, "two", "only/on/others");
    ASSERT_TRUE(refused);
    EXPECT_STREQ(refused->what(), "rank 1 (node B): only/on/others is not there");
    GenerateRequest request = request_of(0, 20, 8);
    request.adapter = "one";
    const auto sink = std::make_shared<Answer>();
    ASSERT_EQ(engine.submit(request, sink, nullptr), SubmitResult::kAccepted);
    engine.unload_adapter("one");
    EXPECT_TRUE(engine.drain(Deadline::in_seconds(20)));
    EXPECT_EQ(sink->last.finish, FinishReason::kLength);
    EXPECT_EQ(sink->tokens.size(), 8u);
  }
  ranks.head.abort("done");
  ranks.join();
}

TEST(Worker, AdaptersWhoseFilesDifferAreRefused) {
  Ranks ranks({0, 1, 1});
  ranks.start([](comm::Group& group, HistoryModel& model) {
    if (group.rank() == 1) model.other_files = "-old";
  });
  {
    ChannelExecutor executor(ranks.head);
    Engine engine(engine_options(), executor);
    const auto refused = load(engine, "one", "/adapters/one");
    ASSERT_TRUE(refused);
    const std::string text = refused->what();
    EXPECT_NE(text.find("the adapter's files differ between nodes"), std::string::npos) << text;
    EXPECT_NE(text.find("at rank 1 (node B), expected"), std::string::npos) << text;
    EXPECT_TRUE(engine.adapters().empty());
  }
  ranks.head.abort("done");
  ranks.join();
}

// Every rank gets plans in which rank 0's guesses stand, and computes them: its KV cache has them.
TEST(Worker, ADraftModelOnRank0ChangesNoTokenOfAnyRank) {
  Ranks plain({0, 1, 1});
  plain.start();
  const auto expected = answers(plain, true);
  plain.stop();
  EngineOptions options = engine_options();
  options.draft_tokens = 4;
  options.draft_model = true;
  StepLimits limits = kLimits;
  limits.draft_sequences = options.draft_batch;
  Ranks ranks({0, 1, 1}, "", limits);
  std::mutex mutex;
  std::map<int, std::vector<int32_t>> computed;  // by rank
  ranks.start([&](comm::Group& group, HistoryModel& model) {
    model.on_forward = [&](const models::StepInputs& in, float*) {
      group.barrier();
      const std::lock_guard lock(mutex);
      auto& tokens = computed[group.rank()];
      tokens.insert(tokens.end(), in.tokens.begin(), in.tokens.end());
    };
  });
  EngineStats stats;
  EXPECT_EQ(answers(ranks, true, options, &stats), expected);
  ranks.stop();
  for (const std::string& error : ranks.errors) EXPECT_EQ(error, "");
  EXPECT_GT(stats.accepted_draft_tokens, 20u);
  EXPECT_GT(stats.draft_ns, 0u);
  EXPECT_LE(stats.draft_ns, stats.compute_ns);
  ASSERT_EQ(computed.size(), 3u);
  EXPECT_EQ(computed[1], computed[0]);
  EXPECT_EQ(computed[2], computed[0]);
}

TEST(Worker, ADraftOrderWithoutADraftModelIsRefused) {
  StepLimits limits = kLimits;
  limits.draft_sequences = 2;
  const UniqueFd memory = create_step_channel(limits);
  StepChannelHead head(memory.get(), limits);
  StepPlanWriter plan;
  plan.begin(StepKind::kCompute, kGeneration, 1);
  plan.add_sequence(std::vector<int32_t>{1}, 1, std::vector<int32_t>{0}, 8, true);
  DraftOrderWriter order;
  order.begin(kGeneration, 1);
  order.add(std::vector<int32_t>{1}, 1, std::vector<int32_t>{0}, 8, 0, 0);
  head.send(plan.finish(), order.finish());
  StepChannelRank channel(memory.get(), limits);
  const auto alone = comm::single_group();
  comm::TracedGroup group(*alone);
  HistoryModel model(limits.blocks, limits.block_size);
  EXPECT_THROW(run_worker({.generation = kGeneration, .limits = limits, .idle_seconds = 5}, model,
                          group, &channel, nullptr),
               Error);
  try {
    (void)head.wait_logits(Deadline::in_seconds(5), nullptr);
    ADD_FAILURE() << "the step was answered";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("rank 0 has no draft model"), std::string::npos)
        << error.what();
  }
}

TEST(Worker, TracedStepsTellWhenEveryRankDidWhat) {
  Ranks ranks({0, 1, 1});
  // Two barriers a step; rank 2 is late for the second.
  ranks.start([](comm::Group& group, HistoryModel& model) {
    model.on_forward = [&group](const models::StepInputs&, float*) {
      group.barrier();
      if (group.rank() == 2) std::this_thread::sleep_for(std::chrono::milliseconds(20));
      group.barrier();
    };
  });
  {
    ChannelExecutor executor(ranks.head);
    Engine engine(engine_options(), executor);
    EXPECT_EQ(engine.take_trace(true), std::nullopt);
    ASSERT_TRUE(engine.begin_trace(2));
    EXPECT_FALSE(engine.begin_trace(1));
    EXPECT_EQ(engine.take_trace(false), std::nullopt);
    const auto sink = std::make_shared<Answer>();
    ASSERT_EQ(engine.submit(request_of(1, 4, 5), sink, nullptr), SubmitResult::kAccepted);
    EXPECT_TRUE(engine.drain(Deadline::in_seconds(20)));
    const auto trace = engine.take_trace(false);
    ASSERT_TRUE(trace && trace->size() == 2);
    EXPECT_EQ(trace->at(0).tokens, 4);
    for (const StepTrace& step : *trace) {
      EXPECT_EQ(step.generation, kGeneration);
      EXPECT_EQ(step.rows, 1);
      EXPECT_TRUE(step.begin_ns <= step.sent_ns && step.sent_ns < step.answered_ns &&
                  step.answered_ns <= step.end_ns);
      ASSERT_EQ(step.ranks.size(), 3u);
      for (const StepTrace::Rank& rank : step.ranks) {
        EXPECT_EQ(rank.dropped, 0u);
        ASSERT_EQ(rank.collectives.size(), 2u);
        uint32_t at = 0;
        for (const CollectiveTrace& c : rank.collectives) {
          EXPECT_GE(c.begin, at);
          EXPECT_LE(c.wait, c.length + 1);
          at = c.begin + c.length;
        }
        EXPECT_LE(at, rank.length + 1);
      }
      constexpr uint32_t kTenMs = 100'000;
      EXPECT_GE(step.ranks[0].collectives[1].length, kTenMs);
      EXPECT_GE(step.ranks[1].collectives[1].length, kTenMs);
      EXPECT_GE(step.ranks[2].collectives[1].begin, kTenMs);
    }
    EXPECT_EQ(engine.take_trace(true), std::nullopt);
  }
  ranks.stop();
  for (const std::string& error : ranks.errors) EXPECT_EQ(error, "");
}

TEST(Worker, AFaultOfOneRankReachesTheHead) {
  Ranks ranks({0, 1, 1});
  ranks.start([](comm::Group& group, HistoryModel& model) {
    if (group.rank() != 2) return;
    model.on_forward = [&group, steps = 0](const models::StepInputs&, float*) mutable {
      if (++steps == 5) throw Error(Code::kDataLoss, "the KV cache is on fire");
      group.barrier();
    };
  });
  ChannelExecutor executor(ranks.head);
  Engine engine(engine_options(), executor);
  const auto sink = std::make_shared<Answer>();
  ASSERT_EQ(engine.submit(request_of(1, 4, 50), sink, nullptr), SubmitResult::kAccepted);
  EXPECT_TRUE(engine.drain(Deadline::in_seconds(10)));
  ASSERT_TRUE(sink->last.error.has_value());
  const std::string text = sink->last.error->what();
  EXPECT_NE(text.find("rank 2 failed after step 4: the KV cache is on fire"), std::string::npos)
      << text;
  EXPECT_EQ(sink->tokens.size(), 4u);
  ranks.join();
  for (const std::string& error : ranks.errors) {
    EXPECT_NE(error.find("the KV cache is on fire"), std::string::npos) << error;
  }
}

TEST(Worker, AbortByTheHeadEndsEveryRank) {
  Ranks ranks({0, 0});
  ranks.start();
  {
    ChannelExecutor executor(ranks.head);
    Engine engine(engine_options(), executor);
    const auto sink = std::make_shared<Answer>();
    ASSERT_EQ(engine.submit(request_of(1, 4, 90), sink, nullptr), SubmitResult::kAccepted);
    engine.fail(Error(Code::kUnavailable, "node 10.0.0.9 was lost"));
    EXPECT_TRUE(engine.drain(Deadline::in_seconds(10)));
    EXPECT_STREQ(sink->last.error->what(), "node 10.0.0.9 was lost");
  }
  ranks.join();
  for (const std::string& error : ranks.errors) {
    EXPECT_NE(error.find("node 10.0.0.9 was lost"), std::string::npos) << error;
  }
}

std::string failure_after(uint64_t generation, uint64_t step) {
  Ranks ranks({0, 0});
  ranks.start();
  StepPlanWriter writer;
  writer.begin(StepKind::kIdle, generation, step);
  ranks.head.send(writer.finish());
  std::string message = "no failure";
  try {
    (void)ranks.head.wait_logits(Deadline::in_seconds(10), nullptr);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::kUnavailable);
    message = error.what();
  }
  if (message == "no failure") ranks.head.abort("the test is over");
  ranks.join();
  for (const std::string& error : ranks.errors) EXPECT_NE(error, "");
  return message;
}

TEST(Worker, PlansOfOtherGenerationsAndStepsAreRefused) {
  EXPECT_EQ(failure_after(kGeneration, 1), "no failure");
  EXPECT_NE(failure_after(kGeneration + 1, 1).find("step plan: generation is 8, expected 7"),
            std::string::npos);
  EXPECT_NE(failure_after(kGeneration, 2).find("step plan: step is 2, expected 1"),
            std::string::npos);
}

TEST(Worker, AFolderThatCannotBeMadeIsNamed) {
  Ranks ranks({0}, "/proc/nowhere/logits");
  ranks.start();
  ranks.join();
  EXPECT_NE(ranks.errors[0].find("logits folder '/proc/nowhere/logits' cannot be made"),
            std::string::npos)
      << ranks.errors[0];
}

}  // namespace
}  // namespace phalanx::engine
