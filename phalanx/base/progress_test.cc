#include "phalanx/base/progress.h"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

namespace phalanx {
namespace {

TEST(Progress, LinesInALog) {
  std::vector<std::string> lines;
  Progress progress("loading", 4'000'000, ProgressUnit::kBytes,
                    {.terminal = false,
                     .line_every_seconds = 0,
                     .line = [&](std::string_view line) { lines.emplace_back(line); }});
  progress.advance(1'000'000);
  progress.advance(1'000'000);
  progress.done();
  progress.done();
  progress.advance(1);
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(lines[0], "loading:  25 % of 4.0 MB");
  EXPECT_EQ(lines[1], "loading:  50 % of 4.0 MB");
  EXPECT_EQ(lines[2].rfind("loading: 2.0 MB in 0.0 s, ", 0), 0u) << lines[2];
}

TEST(Progress, ShortWorkGivesOneLine) {
  std::vector<std::string> lines;
  Progress progress(
      "tensors", 100, ProgressUnit::kItems,
      {.terminal = false, .line = [&](std::string_view line) { lines.emplace_back(line); }});
  std::vector<std::jthread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&] {
      for (int k = 0; k < 25; ++k) progress.advance(1);
    });
  threads.clear();
  progress.done();
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_EQ(lines[0], "tensors: 100 in 0.0 s");
}

TEST(Progress, RateCountsFromTheStartOfTheWork) {
  std::string last;
  Progress progress("loading", 4'000'000, ProgressUnit::kBytes,
                    {.terminal = false,
                     .start = Clock::now() - std::chrono::seconds(2),
                     .line = [&](std::string_view line) { last = line; }});
  progress.advance(4'000'000);
  progress.done();
  EXPECT_EQ(last, "loading: 4.0 MB in 2.0 s, 2.0 MB/s");
}

TEST(Progress, BarOnATerminal) {
  std::string drawn;
  {
    Progress progress("loading", 10, ProgressUnit::kItems,
                      {.terminal = true, .draw = [&](std::string_view text) { drawn += text; }});
    std::this_thread::sleep_for(std::chrono::milliseconds(110));
    progress.advance(5);
  }
  EXPECT_EQ(drawn, "\r\x1b[K[###############...............] loading:  50 % of 10\n");
}

}  // namespace
}  // namespace phalanx
