#include "phalanx/engine/step_channel.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <thread>

#include "phalanx/base/error.h"
#include "phalanx/engine/rank_page.h"

namespace phalanx::engine {
namespace {

constexpr StepLimits kLimits{.max_tokens = 8,
                             .max_rows = 4,
                             .max_sequence = 64,
                             .blocks = 8,
                             .block_size = 8,
                             .vocab_size = 16};

std::vector<std::byte> plan_with_row(uint64_t generation, uint64_t step) {
  StepPlanWriter writer;
  writer.begin(StepKind::kCompute, generation, step);
  const std::vector<int32_t> tokens{1};
  const std::vector<int32_t> blocks{0};
  writer.add_sequence(tokens, 1, blocks, 8, true);
  const auto bytes = writer.finish();
  return {bytes.begin(), bytes.end()};
}

std::string message_of(Code code, const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    return error.what();
  }
  return "nothing thrown";
}

struct Pair {
  UniqueFd fd = create_step_channel(kLimits);
  StepChannelHead head{fd.get(), kLimits};
  StepChannelRank rank{fd.get(), kLimits};
};

TEST(StepChannel, MemoryIsSealedAndCloseOnExec) {
  const UniqueFd fd = create_step_channel(kLimits);
  EXPECT_NE(::fcntl(fd.get(), F_GETFD) & FD_CLOEXEC, 0);
  EXPECT_NE(::ftruncate(fd.get(), 1), 0);
  EXPECT_NE(::ftruncate(fd.get(), step_channel_bytes(kLimits) * 2), 0);
  StepLimits other = kLimits;
  other.max_rows = 4000;
  const std::string message =
      message_of(Code::kFailedPrecondition, [&] { StepChannelRank rank(fd.get(), other); });
  EXPECT_NE(message.find("step channel: the shared memory has"), std::string::npos) << message;
}

TEST(StepChannel, PlansGoThereAndLogitsComeBack) {
  Pair pair;
  std::thread rank([&] {
    for (uint64_t step = 1; step <= 500; ++step) {
      const auto plan = pair.rank.wait_plan(Deadline::in_seconds(10));
      StepPlanHeader header;
      ASSERT_GE(plan.size(), sizeof(header));
      std::memcpy(&header, plan.data(), sizeof(header));
      EXPECT_EQ(header.step, step);
      EXPECT_EQ(plan.size(), header.bytes);
      pair.rank.logits()[15] = static_cast<float>(step);
      pair.rank.publish(header.generation, header.step, {.total_ns = 5, .compute_ns = 3});
    }
  });
  for (uint64_t step = 1; step <= 500; ++step) {
    if (step % 100 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // past the spin
    pair.head.send(plan_with_row(9, step));
    StepTiming timing;
    const auto logits = pair.head.wait_logits(Deadline::in_seconds(10), &timing);
    ASSERT_EQ(logits.size(), 16u);
    ASSERT_EQ(logits[15], static_cast<float>(step));
    ASSERT_EQ(timing.compute_ns, 3);
  }
  rank.join();
}

TEST(StepChannel, StaleResultsAreDropped) {
  Pair pair;
  pair.head.send(plan_with_row(2, 5));
  (void)pair.rank.wait_plan(Deadline::in_seconds(1));
  pair.rank.publish(1, 5, {});
  pair.rank.publish(2, 4, {});
  EXPECT_NE(message_of(Code::kDeadlineExceeded,
                       [&] { (void)pair.head.wait_logits(Deadline::in_seconds(0.02), nullptr); })
                .find("rank 0 did not answer step 5 of generation 2"),
            std::string::npos);
  // Still outstanding: no second plan, and the right answer is taken.
  EXPECT_NE(message_of(Code::kFailedPrecondition, [&] { pair.head.send(plan_with_row(2, 6)); })
                .find("step 5 is still outstanding"),
            std::string::npos);
  pair.rank.publish(2, 5, {});
  EXPECT_EQ(pair.head.wait_logits(Deadline::in_seconds(1), nullptr).size(), 16u);
  // A result that was there before a plan is not its answer, even with the same numbers.
  pair.head.send(plan_with_row(2, 5));
  EXPECT_THROW((void)pair.head.wait_logits(Deadline::in_seconds(0.01), nullptr), Error);
}

TEST(StepChannel, TheRanksMessageReachesTheHead) {
  Pair pair;
  pair.head.send(plan_with_row(1, 1));
  std::thread rank([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    pair.rank.fail("rank 2 on host b was lost");
    pair.rank.fail("a later message");
  });
  EXPECT_EQ(message_of(Code::kUnavailable,
                       [&] { (void)pair.head.wait_logits(Deadline::in_seconds(10), nullptr); }),
            "rank 2 on host b was lost");
  rank.join();
  EXPECT_EQ(message_of(Code::kUnavailable, [&] { pair.head.send(plan_with_row(1, 2)); }),
            "rank 2 on host b was lost");
}

TEST(StepChannel, AbortWakesBothSides) {
  Pair pair;
  std::atomic<int> woken{0};
  std::thread rank([&] {
    const std::string message = message_of(
        Code::kAborted, [&] { (void)pair.rank.wait_plan(Deadline::in_seconds(60)); });
    EXPECT_NE(message.find("node 10.0.0.2 died"), std::string::npos) << message;
    ++woken;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const int64_t begin = now_ns();
  pair.head.abort("node 10.0.0.2 died");
  rank.join();
  EXPECT_LT(now_ns() - begin, 1'000'000'000);
  EXPECT_EQ(woken, 1);
  EXPECT_EQ(message_of(Code::kAborted, [&] { pair.head.send(plan_with_row(1, 1)); }),
            "the step channel was aborted: node 10.0.0.2 died");
}

TEST(StepChannel, NoPlanBeforeTheDeadlineIsEmpty) {
  Pair pair;
  EXPECT_TRUE(pair.rank.wait_plan(Deadline::in_seconds(0.01)).empty());
}

TEST(StepChannel, PlansThatDoNotFitAreRefused) {
  Pair pair;
  const std::vector<std::byte> tiny(4);
  const std::vector<std::byte> huge(1 << 20);
  EXPECT_EQ(message_of(Code::kInvalidArgument, [&] { pair.head.send(tiny); }),
            "a step plan of 4 bytes cannot be sent, expected 48 to 4096");
  EXPECT_THROW(pair.head.send(huge), Error);
}

TEST(StepChannel, WorksBetweenProcesses) {
  Pair pair;
  const pid_t child = ::fork();
  if (child == 0) {
    // Only this thread lives here; leave without destructors or atexit handlers.
    int status = 1;
    try {
      StepChannelRank rank(pair.fd.get(), kLimits);
      for (uint64_t step = 1; step <= 20; ++step) {
        if (rank.wait_plan(Deadline::in_seconds(10)).empty()) ::_exit(2);
        rank.logits()[0] = static_cast<float>(step);
        rank.publish(1, step, {});
      }
      status = 0;
    } catch (...) {
    }
    ::_exit(status);
  }
  for (uint64_t step = 1; step <= 20; ++step) {
    pair.head.send(plan_with_row(1, step));
    ASSERT_EQ(pair.head.wait_logits(Deadline::in_seconds(10), nullptr)[0],
              static_cast<float>(step));
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST(RankPage, IsSharedBetweenMappings) {
  const UniqueFd fd = create_rank_page();
  RankPage* const rank = map_rank_page(fd.get());
  rank->steps_done.fetch_add(3);
  EXPECT_EQ(map_rank_page(fd.get())->steps_done.load(), 3u);
  const UniqueFd other = create_step_channel(kLimits);
  EXPECT_THROW((void)map_rank_page(other.get()), Error);
}

}  // namespace
}  // namespace phalanx::engine
