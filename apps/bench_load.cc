#include "apps/bench_load.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <vector>

#include "apps/host.h"
#include "phalanx/base/clock.h"
#include "phalanx/base/error.h"
#include "phalanx/base/log.h"
#include "phalanx/base/thread_pool.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/comm/bootstrap.h"
#include "phalanx/models/model.h"
#include "phalanx/weights/arena.h"

namespace phalanx::apps {
namespace {

constexpr int64_t kDirectBytes = 4 << 20;

struct LoadArguments {
  std::string model;
  int threads = 0;
  int rounds = 5;
  bool cold = false;
};

// What one process measured, handed over as bytes.
struct Measured {
  double seconds = 0;
  int64_t bytes_read = 0;
  int64_t peak_bytes = 0;   // resident, most ever (VmHWM)
  int64_t share_bytes = 0;  // to be read for this rank
  int64_t weight_bytes = 0;
  bool failed = true;
};

double seconds_since(int64_t begin) { return static_cast<double>(now_ns() - begin) * 1e-9; }

// In a process of its own, so that memory and its peak are the measurement's alone.
Measured apart(const std::function<Measured()>& body) {
  int fds[2];
  if (::pipe2(fds, O_CLOEXEC) != 0) throw Error(Code::kResourceExhausted, "bench: no pipe");
  const UniqueFd in(fds[0]);
  UniqueFd out(fds[1]);
  std::fflush(stdout);
  const pid_t pid = ::fork();
  if (pid == 0) {
    Measured m;
    try {
      m = body();
      m.failed = false;
    } catch (const std::exception& e) {
      fmt::print(stderr, "phalanx: {}\n", e.what());
    }
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);)
      if (line.starts_with("VmHWM:")) m.peak_bytes = std::stoll(line.substr(6)) * 1024;
    ::_exit(::write(out.get(), &m, sizeof m) == sizeof m ? 0 : 1);
  }
  out.reset();
  Measured m;
  const bool whole = ::read(in.get(), &m, sizeof m) == sizeof m;
  if (pid > 0) ::waitpid(pid, nullptr, 0);
  if (!whole || m.failed) throw Error(Code::kInternal, "bench load: a measurement failed");
  return m;
}

std::vector<std::string> weight_files(const std::string& model) {
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(model))
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  return files;
}

// Leaves no page of the weights in the system's cache, where nobody else holds them.
void forget(const std::vector<std::string>& files) {
  for (const std::string& path : files) {
    const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    ::fdatasync(fd.get());
    ::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED);
  }
}

// All bytes of the files past the cache, 4 MiB at a time.
Measured read_direct(const std::vector<std::string>& files, int threads) {
  ThreadPool pool({.threads = std::max(2, threads)});
  Measured m;
  const int64_t begin = now_ns();
  for (const std::string& path : files) {
    const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT));
    if (!fd.valid())
      throw Error(Code::kUnavailable, fmt::format("cannot open {} with O_DIRECT: {}", path,
                                                  std::strerror(errno)));
    const auto size = static_cast<int64_t>(std::filesystem::file_size(path));
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    pool.run([&](int) {
      auto* buffer = static_cast<std::byte*>(std::aligned_alloc(4096, kDirectBytes));
      for (int64_t at = 0; (at = next.fetch_add(kDirectBytes)) < size;)
        if (::pread(fd.get(), buffer, kDirectBytes, at) < 0) failed = true;
      std::free(buffer);
    });
    if (failed) throw Error(Code::kUnavailable, fmt::format("cannot read {} with O_DIRECT", path));
    m.bytes_read += size;
  }
  m.seconds = seconds_since(begin);
  return m;
}

// The weights once from memory to fresh memory of the kind that a rank keeps them in.
Measured copy(int64_t bytes, int threads) {
  ThreadPool pool({.threads = threads});
  const weights::Arena from(bytes);
  pool.run([&](int t) {
    std::memset(from.data() + bytes * t / threads, 1, static_cast<size_t>(bytes / threads));
  });
  Measured m;
  const int64_t begin = now_ns();
  weights::Arena to(bytes);
  (void)to.take_huge_pages(pool);
  pool.run([&](int t) {
    const int64_t at = bytes * t / threads;
    std::memcpy(to.data() + at, from.data() + at, static_cast<size_t>(bytes / threads));
  });
  m.seconds = seconds_since(begin);
  m.bytes_read = bytes;
  return m;
}

Measured load(const std::string& model, int threads) {
  ThreadPool pool({.threads = threads});
  const models::ModelInfo info = models::read_model_info(model);
  const models::ModelOptions options{.directory = model,
                                     .isa = ops::choose_isa(),
                                     .max_step_tokens = 64,
                                     .max_step_rows = 8,
                                     .max_sequence = 256,
                                     .weights = {1.0},
                                     .threads = threads};
  const models::MemoryNeed need = models::memory_need(info, options);
  const std::unique_ptr<comm::Group> group = comm::single_group();
  const int64_t begin = now_ns();
  const auto loaded = models::load_model(options, *group, pool, {});
  return {.seconds = seconds_since(begin),
          .bytes_read = loaded->load_stats().bytes_read,
          .share_bytes = need.read_bytes,
          .weight_bytes = need.weight_bytes};
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

}  // namespace

int bench_load(int argc, char** argv) {
  LoadArguments a;
  CLI::App app{"Loading beside plain reading and copying of the same bytes.", "phalanx bench load"};
  app.add_option("--model", a.model, "checkpoint directory")->required();
  app.add_option("--threads", a.threads, "0: all usable cores")->check(CLI::Range(0, 1024));
  app.add_option("--rounds", a.rounds, "interleaved; medians are printed")->check(CLI::Range(1, 100));
  app.add_flag("--cold", a.cold, "also with the disk as the limit: the weights leave the system's cache first");
  CLI11_PARSE(app, argc, argv);
  set_up_log({.level = LogLevel::kWarn});
  const int threads = a.threads > 0 ? a.threads : host_resources().usable_cores();
  const std::vector<std::string> files = weight_files(a.model);
  if (files.empty())
    throw Error(Code::kNotFound, fmt::format("{} has no *.safetensors files", a.model));
  std::vector<double> loads, copies, cold_loads, directs;
  Measured last = apart([&] { return load(a.model, threads); });  // the system's cache is warm now
  for (int round = 0; round < a.rounds; ++round) {
    copies.push_back(apart([&] { return copy(last.weight_bytes, threads); }).seconds);
    last = apart([&] { return load(a.model, threads); });
    loads.push_back(last.seconds);
  }
  const double gb = static_cast<double>(last.bytes_read) * 1e-9;
  fmt::print("{}: {:.2f} GB read of a share of {:.2f} GB, packed {:.2f} GB, peak resident {:.2f} GB; "
             "{} threads, medians of {} rounds\n",
             a.model, gb, static_cast<double>(last.share_bytes) * 1e-9,
             static_cast<double>(last.weight_bytes) * 1e-9,
             static_cast<double>(last.peak_bytes) * 1e-9, threads, a.rounds);
  fmt::print("  cached: load {:.2f} s, memcpy to fresh memory {:.2f} s, ratio {:.2f}\n", median(loads),
             median(copies), median(loads) / median(copies));
  if (a.cold) {
    for (int round = 0; round < a.rounds; ++round) {
      directs.push_back(apart([&] { return read_direct(files, threads); }).seconds);
      forget(files);
      cold_loads.push_back(apart([&] { return load(a.model, threads); }).seconds);
    }
    fmt::print("  disk:   load {:.2f} s, O_DIRECT reading {:.2f} s ({:.2f} GB/s), ratio {:.2f}\n",
               median(cold_loads), median(directs), gb / median(directs),
               median(cold_loads) / median(directs));
  }
  return 0;
}

}  // namespace phalanx::apps
