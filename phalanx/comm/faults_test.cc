#include <gtest/gtest.h>

#include <chrono>
#include <latch>

#include "phalanx/comm/test_ranks.h"

namespace phalanx::comm {
namespace {

using std::chrono::milliseconds;

bool mentions(const std::optional<Error>& error, const std::string& text) {
  return error && std::string(error->what()).find(text) != std::string::npos;
}
std::string text_of(const TestRanks::Outcome& outcome) {
  return outcome.error ? outcome.error->what() : "no error";
}

struct Layout {
  const char* name;
  std::vector<int> node_of;
  bool ucx = false;
};
void PrintTo(const Layout& layout, std::ostream* out) { *out << layout.name; }

enum class Call { kAllGather, kGather, kBroadcast, kAllReduce, kBarrier };

void work(Group& group, Call call, int root) {
  std::vector<std::byte> matrix(static_cast<size_t>(group.size()) * 600);
  const std::vector<int64_t> row_bytes(group.size(), 600);
  std::vector<float> values(300'000, 1.0f);
  switch (call) {
    case Call::kAllGather: return group.all_gather(matrix.data(), 1, row_bytes);
    case Call::kGather: return group.gather(matrix.data(), 1, row_bytes, root);
    case Call::kBroadcast: return group.broadcast(matrix, root);
    case Call::kAllReduce: return group.all_reduce(values);
    case Call::kBarrier: return group.barrier();
  }
}

class FaultsTest : public ::testing::TestWithParam<Layout> {
 protected:
  void SetUp() override {
    if (GetParam().ucx)
      if (const std::string why = ucx_problem(); !why.empty()) GTEST_SKIP() << why;
  }
  static TestRanks of_layout() {
    TestRanks ranks(GetParam().node_of);
    if (GetParam().ucx) ranks.shared_options().transport = Transport::kUcx;
    return ranks;
  }
};

// Victims: first, last and a middle rank.
std::vector<int> victims(int size) { return {0, size / 2, size - 1}; }

TEST_P(FaultsTest, ARankThatLeavesIsNamedByAllWithinASecond) {
  for (const Call call : {Call::kGather, Call::kAllReduce}) {
    for (const int victim : victims(static_cast<int>(GetParam().node_of.size()))) {
      TestRanks ranks = of_layout();
      std::latch formed(ranks.size());
      Clock::time_point event;
      const auto outcomes = ranks.run_with([&](int rank) {
        auto group = ranks.form(rank);
        work(*group, call, 0);
        formed.arrive_and_wait();
        if (rank == victim) {
          std::this_thread::sleep_for(milliseconds(80));  // the others sleep by now
          event = Clock::now();
          group.reset();
          return;
        }
        for (;;) work(*group, call, 0);
      });
      const std::string name = fmt::format("rank {} (host-", victim);
      for (int rank = 0; rank < ranks.size(); ++rank) {
        if (rank == victim) continue;
        EXPECT_TRUE(mentions(outcomes[rank].error, name)) << rank << ": " << text_of(outcomes[rank]);
        EXPECT_EQ(outcomes[rank].error->code(), Code::kUnavailable);
        EXPECT_LT(outcomes[rank].end - event, std::chrono::seconds(1));
      }
    }
  }
}

TEST_P(FaultsTest, AbortWakesEveryRankWithItsReason) {
  for (const Call call : {Call::kAllGather, Call::kBroadcast}) {
    for (const int victim : victims(static_cast<int>(GetParam().node_of.size()))) {
      TestRanks ranks = of_layout();
      std::latch formed(ranks.size());
      Clock::time_point event;
      const auto outcomes = ranks.run_with([&](int rank) {
        auto group = ranks.form(rank);
        formed.arrive_and_wait();
        if (rank == victim) {
          std::this_thread::sleep_for(milliseconds(80));  // the others sleep by now
          event = Clock::now();
          std::jthread([&] { group->abort("the disk is on fire"); }).join();
          EXPECT_THROW(work(*group, call, 0), Error);
          throw Error(Code::kAborted, "victim");
        }
        for (;;) work(*group, call, victim);
      });
      for (int rank = 0; rank < ranks.size(); ++rank) {
        if (rank == victim) continue;
        EXPECT_TRUE(mentions(outcomes[rank].error, "the disk is on fire")) << text_of(outcomes[rank]);
        EXPECT_TRUE(mentions(outcomes[rank].error, fmt::format("rank {} (host-", victim)));
        EXPECT_EQ(outcomes[rank].error->code(), Code::kAborted);
        EXPECT_LT(outcomes[rank].end - event, std::chrono::seconds(1));
      }
    }
  }
}

TEST_P(FaultsTest, AbortWakesItsOwnWaitingThread) {
  TestRanks ranks = of_layout();
  std::latch formed(ranks.size()), ended(ranks.size());
  const auto outcomes = ranks.run_with([&](int rank) {
    auto group = ranks.form(rank);
    formed.arrive_and_wait();
    if (rank == 0) {
      std::jthread other([&] {
        std::this_thread::sleep_for(milliseconds(80));
        group->abort("enough");
      });
      EXPECT_THROW(group->barrier(), Error);
    }
    ended.arrive_and_wait();  // the others call nothing until rank 0 has given up
    while (rank != 0) group->barrier();
  });
  for (int rank = 1; rank < ranks.size(); ++rank)
    EXPECT_TRUE(mentions(outcomes[rank].error, "enough")) << text_of(outcomes[rank]);
}

TEST_P(FaultsTest, AfterAnyThrowTheGroupIsDead) {
  TestRanks ranks = of_layout();
  std::latch formed(ranks.size());
  const auto outcomes = ranks.run([&](Group& group) {
    formed.arrive_and_wait();
    if (group.rank() == 0) group.abort("first reason");
    std::string first, second;
    try {
      for (;;) group.barrier();
    } catch (const Error& error) {
      first = error.what();
    }
    try {
      work(group, Call::kAllGather, 0);
    } catch (const Error& error) {
      second = error.what();
    }
    EXPECT_EQ(first, second);
    EXPECT_NE(first.find("first reason"), std::string::npos) << first;
  });
  for (const auto& outcome : outcomes) EXPECT_FALSE(outcome.error) << text_of(outcome);
}

TEST_P(FaultsTest, APeerThatNeverArrivesEndsAtTheCap) {
  TestRanks ranks = of_layout();
  ranks.shared_options().operation_seconds = 0.3;
  const int victim = ranks.size() - 1;
  std::latch formed(ranks.size()), ended(ranks.size());
  const auto outcomes = ranks.run_with([&](int rank) {
    auto group = ranks.form(rank);
    formed.arrive_and_wait();
    try {
      if (rank != victim) group->barrier();
    } catch (const Error&) {
      ended.arrive_and_wait();
      throw;
    }
    ended.arrive_and_wait();
  });
  for (int rank = 0; rank < victim; ++rank) {
    EXPECT_TRUE(mentions(outcomes[rank].error, "within 0.3 s")) << text_of(outcomes[rank]);
    EXPECT_EQ(outcomes[rank].error->code(), Code::kDeadlineExceeded);
    EXPECT_LT(outcomes[rank].seconds, 1.5);
  }
}

TEST_P(FaultsTest, RanksThatCallDifferentThingsAreTold) {
  TestRanks ranks = of_layout();
  const auto outcomes = ranks.run([&](Group& group) {
    work(group, group.rank() == 1 ? Call::kAllReduce : Call::kAllGather, 0);
    for (;;) group.barrier();
  });
  for (const auto& outcome : outcomes) {
    EXPECT_TRUE(mentions(outcome.error, "same collectives in the same order")) << text_of(outcome);
    EXPECT_TRUE(mentions(outcome.error, "all_reduce")) << text_of(outcome);
    EXPECT_TRUE(mentions(outcome.error, "all_gather")) << text_of(outcome);
  }
}

TEST_P(FaultsTest, FormingNamesARankThatIsMissing) {
  TestRanks ranks = of_layout();
  ranks.shared_options().connect_seconds = 0.6;
  const int missing = ranks.size() / 2;
  const auto outcomes = ranks.run_with([&](int rank) {
    if (rank == missing) return;
    (void)ranks.form(rank);
  });
  for (int rank = 0; rank < ranks.size(); ++rank) {
    if (rank == missing) continue;
    EXPECT_TRUE(mentions(outcomes[rank].error, fmt::format("rank {} (host-", missing)))
        << text_of(outcomes[rank]);
    EXPECT_EQ(outcomes[rank].error->code(), Code::kDeadlineExceeded);
    EXPECT_LT(outcomes[rank].seconds, 2.0);
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, FaultsTest,
                         ::testing::Values(Layout{"TwoOnOneNode", {0, 0}}, Layout{"TwoNodes", {0, 1}},
                                           Layout{"FourOnOneNode", {0, 0, 0, 0}},
                                           Layout{"ThreeNodes", {0, 1, 2}},
                                           Layout{"TwoByTwo", {0, 0, 1, 1}},
                                           Layout{"FiveUneven", {1, 0, 0, 2, 0}},
                                           Layout{"TwoNodesUcx", {0, 1}, true},
                                           Layout{"TwoAndOneUcx", {0, 0, 1}, true}),
                         [](const auto& info) { return info.param.name; });

TEST(SingleGroupTest, DoesNothingCorrectlyAndCanBeAborted) {
  const auto group = single_group();
  std::vector<std::byte> matrix(6, std::byte{5});
  const int64_t row_bytes[] = {3};
  group->all_gather(matrix.data(), 2, row_bytes);
  group->gather(matrix.data(), 2, row_bytes, 0);
  EXPECT_EQ(matrix, std::vector<std::byte>(6, std::byte{5}));
  group->abort("why not");
  try {
    group->barrier();
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::kAborted);
    EXPECT_NE(std::string(error.what()).find("why not"), std::string::npos);
  }
}

}  // namespace
}  // namespace phalanx::comm
