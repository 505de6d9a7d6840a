#include "apps/bench_barrier.h"

#include <time.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "apps/host.h"
#include "phalanx/base/clock.h"
#include "phalanx/base/error.h"
#include "phalanx/base/thread_pool.h"

namespace phalanx::apps {
namespace {

double cpu_seconds() {
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

double percentile(const std::vector<double>& sorted, double p) {
  return sorted[static_cast<size_t>(p * static_cast<double>(sorted.size() - 1))];
}

}  // namespace

int bench_barrier(int argc, char** argv) {
  int repeats = 20000;
  CLI::App app("A parallel region of the thread pool with nothing in it: fork and join");
  app.add_option("--repeats", repeats, "regions for each number of threads")
      ->check(CLI::Range(100, 10'000'000));
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    std::printf("%s", app.help().c_str());
    return 0;
  } catch (const CLI::ParseError& e) {
    throw Error(Code::kInvalidArgument, std::string(argv[0]) + ": " + e.what());
  }
  const std::vector<int> cpus = host_resources().cpus;
  std::printf(
      "parallel regions with nothing in them, %d each, pinned; idle: CPU time of the pool "
      "while it has nothing to do\n\n"
      "| threads | p10 us | median us | p90 us | idle %% of a core |\n|---|---|---|---|---|\n",
      repeats);
  for (int threads = 1; threads <= static_cast<int>(cpus.size());
       threads = threads < static_cast<int>(cpus.size())
                     ? std::min(2 * threads, static_cast<int>(cpus.size()))
                     : threads + 1) {
    ThreadPool pool({.threads = threads, .cpus = {cpus.begin(), cpus.begin() + threads}});
    std::vector<double> times;
    times.reserve(static_cast<size_t>(repeats));
    for (int i = 0; i < repeats; ++i) {
      const int64_t begin = now_ns();
      pool.run([](int) {});
      times.push_back(static_cast<double>(now_ns() - begin) * 1e-3);
    }
    std::sort(times.begin(), times.end());
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // past the spinning
    const double cpu = cpu_seconds();
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    std::printf("| %d | %.2f | %.2f | %.2f | %.2f |\n", threads, percentile(times, 0.1),
                percentile(times, 0.5), percentile(times, 0.9), (cpu_seconds() - cpu) / 0.2 * 100);
  }
  return 0;
}

}  // namespace phalanx::apps
