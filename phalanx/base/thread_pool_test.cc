#include "phalanx/base/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "phalanx/base/clock.h"
#include "phalanx/base/error.h"

namespace phalanx {
namespace {

TEST(ThreadPool, RunsOnEveryThreadOnce) {
  for (const int threads : {1, 2, 3, 5}) {
    ThreadPool pool({.threads = threads});
    ASSERT_EQ(pool.size(), threads);
    std::vector<int> calls(threads);
    for (int i = 0; i < 200; ++i) pool.run([&](int t) { ++calls[t]; });
    EXPECT_EQ(calls, std::vector<int>(threads, 200));
  }
}

TEST(ThreadPool, ForEachCoversEveryIndexOnce) {
  ThreadPool pool({.threads = 3});
  for (const int64_t count : {0, 1, 7, 100, 1001}) {
    for (const int64_t grain : {1, 4, 1000}) {
      std::vector<int> seen(count);
      pool.for_each(count, grain, [&](int64_t i) { ++seen[i]; });
      EXPECT_EQ(seen, std::vector<int>(count, 1)) << count << " in pieces of " << grain;
    }
  }
}

TEST(ThreadPool, WakesParkedThreads) {
  ThreadPool pool({.threads = 3, .spin_us = 0});
  std::atomic<int> calls = 0;
  for (int i = 0; i < 20; ++i) {
    pool.run([&](int) { ++calls; });
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(calls, 60);
}

TEST(ThreadPool, IdleThreadsUseNoTime) {
  ThreadPool pool({.threads = 3, .spin_us = 50});
  pool.run([](int) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  auto cpu_us = [] {
    rusage u{};
    getrusage(RUSAGE_SELF, &u);
    return u.ru_utime.tv_sec * 1e6 + u.ru_utime.tv_usec + u.ru_stime.tv_sec * 1e6 +
           u.ru_stime.tv_usec;
  };
  const double before = cpu_us();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EXPECT_LT(cpu_us() - before, 30'000);
}

TEST(ThreadPool, RethrowsOnTheCallerAndStaysUsable) {
  ThreadPool pool({.threads = 3});
  for (int thrower = 0; thrower < 3; ++thrower) {
    std::atomic<int> finished = 0;
    try {
      pool.run([&](int t) {
        if (t == thrower) throw Error(Code::kAborted, "thread " + std::to_string(t));
        ++finished;
      });
      FAIL() << "nothing thrown";
    } catch (const Error& e) {
      EXPECT_EQ(e.what(), "thread " + std::to_string(thrower));
    }
    EXPECT_EQ(finished, 2);
    std::atomic<int> calls = 0;
    pool.run([&](int) { ++calls; });
    EXPECT_EQ(calls, 3);
  }
}

TEST(ThreadPool, RefusesImpossibleOptionsByName) {
  auto message = [](const ThreadPool::Options& options) -> std::string {
    try {
      ThreadPool pool(options);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), Code::kInvalidArgument);
      return e.what();
    }
    return "";
  };
  EXPECT_NE(message({.threads = 0}).find("found 0 threads"), std::string::npos);
  EXPECT_NE(message({.threads = 2, .cpus = {0}}).find("found 1 cpus for 2 threads"),
            std::string::npos);
  EXPECT_NE(message({.threads = 2, .cpus = {0, 1023}}).find("cpu 1023"), std::string::npos);
}

}  // namespace
}  // namespace phalanx
