#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "phalanx/comm/test_ranks.h"

namespace phalanx::comm {
namespace {

// Ranks as processes: forked while this one has a single thread. Each ends with status 0 and says
// one line: "done", or the error.
class Processes {
 public:
  Processes(const TestRanks& ranks, const std::function<void(Group&)>& body) {
    for (int rank = 0; rank < ranks.size(); ++rank) {
      int ends[2];
      EXPECT_EQ(::pipe2(ends, O_CLOEXEC), 0);
      pids_.push_back(::fork());
      if (pids_.back() == 0) {
        ::close(ends[0]);
        std::string line = "done";
        try {
          const auto group = ranks.form(rank);
          (void)!::write(ends[1], "formed;", 7);
          body(*group);
        } catch (const std::exception& error) {
          line = error.what();
        }
        (void)!::write(ends[1], line.data(), line.size());
        ::_exit(0);
      }
      ::close(ends[1]);
      pipes_.emplace_back(ends[0]);
    }
  }
  ~Processes() {
    for (const pid_t pid : pids_) {
      ::kill(pid, SIGKILL);
      ::waitpid(pid, nullptr, 0);
    }
  }
  void kill(int rank) { ::kill(pids_[rank], SIGKILL); }
  // Until the rank has formed its group.
  void await_formed(int rank) {
    char word[8] = {};
    EXPECT_EQ(::read(pipes_[rank].get(), word, 7), 7);
    EXPECT_STREQ(word, "formed;");
  }
  // What the rank said until its end.
  std::string last_words(int rank) {
    std::string text;
    char buffer[512];
    for (ssize_t count; (count = ::read(pipes_[rank].get(), buffer, sizeof buffer)) > 0;)
      text.append(buffer, count);
    return text;
  }

 private:
  std::vector<pid_t> pids_;
  std::vector<UniqueFd> pipes_;
};

struct Layout {
  const char* name;
  std::vector<int> node_of;
  bool ucx = false;
};
void PrintTo(const Layout& layout, std::ostream* out) { *out << layout.name; }

class ProcessTest : public ::testing::TestWithParam<Layout> {
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

TEST_P(ProcessTest, RanksSleepAndWakeAcrossProcesses) {
  const TestRanks ranks = of_layout();
  Processes processes(ranks, [](Group& group) {
    for (int round = 0; round < 12; ++round) {
      // Everybody else is asleep by the time this rank arrives.
      if (round % group.size() == group.rank())
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      std::vector<float> values(1000, static_cast<float>(group.rank() + round));
      group.all_reduce(values);
      float expected = 0;
      for (int rank = 0; rank < group.size(); ++rank) expected += static_cast<float>(rank + round);
      if (values[999] != expected) throw Error(Code::kDataLoss, "wrong sum");
    }
  });
  for (int rank = 0; rank < ranks.size(); ++rank)
    EXPECT_EQ(processes.last_words(rank), "formed;done");
}

TEST_P(ProcessTest, AKilledProcessIsNamedByAllWithinASecond) {
  for (const bool asleep : {false, true}) {
    const TestRanks ranks = of_layout();
    const int victim = ranks.size() / 2;
    Processes processes(ranks, [&](Group& group) {
      std::vector<std::byte> matrix(static_cast<size_t>(group.size()) * 50'000);
      const std::vector<int64_t> row_bytes(group.size(), 50'000);
      for (;;) {
        if (asleep && group.rank() == victim) std::this_thread::sleep_for(std::chrono::seconds(60));
        group.all_gather(matrix.data(), 1, row_bytes);
      }
    });
    for (int rank = 0; rank < ranks.size(); ++rank) processes.await_formed(rank);
    std::this_thread::sleep_for(std::chrono::milliseconds(60));
    const auto start = Clock::now();
    processes.kill(victim);
    for (int rank = 0; rank < ranks.size(); ++rank) {
      if (rank == victim) continue;
      const std::string words = processes.last_words(rank);
      EXPECT_NE(words.find(fmt::format("rank {} (host-", victim)), std::string::npos) << words;
      EXPECT_NE(words.find("lost"), std::string::npos) << words;
    }
    EXPECT_LT(Clock::now() - start, std::chrono::seconds(1));
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, ProcessTest,
                         ::testing::Values(Layout{"TwoOnOneNode", {0, 0}}, Layout{"TwoNodes", {0, 1}},
                                           Layout{"FourOnOneNode", {0, 0, 0, 0}},
                                           Layout{"ThreeNodes", {0, 1, 2}},
                                           Layout{"ThreeAndTwo", {0, 0, 0, 1, 1}},
                                           Layout{"TwoNodesUcx", {0, 1}, true},
                                           Layout{"ThreeNodesUcx", {0, 1, 2}, true}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace phalanx::comm
