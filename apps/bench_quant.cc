#include "apps/bench_quant.h"

#include <fmt/format.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>

#include "phalanx/base/error.h"
#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/cpu/integer_kernels.h"
#include "phalanx/ops/cpu/kernels.h"
#include "phalanx/ops/quantised.h"

namespace phalanx::apps {
namespace {

using ops::MatrixView;
using quant::Storage;
using tensor::DType;

struct Format {
  std::string_view name;
  Storage storage;
  int64_t group;  // 0: all of k
};

constexpr Format kFormats[] = {{"w8a8", Storage::kInt8, 0},
                               {"w8a16", Storage::kCodes8, 0},
                               {"w4a16-g128", Storage::kCodes4, 128},
                               {"fp8", Storage::kCodesFp8, 128}};

struct Arguments {
  std::vector<std::string> formats;
  std::vector<int> threads;
  std::vector<int64_t> tokens = {1, 4, 8, 32, 512};
  int rounds = 5;
  int64_t megabytes = 256;
  bool cpu_time = false;
};

constexpr int64_t kHidden = 2048;
constexpr int64_t kQkv = 3072;
constexpr int64_t kIntermediate = 8192;
constexpr int64_t kWeights = kHidden * (kQkv + kHidden + 3 * kIntermediate);

struct Layer {
  ops::PackedLinear qkv, o, down;
  ops::PackedGated gate_up;
};

class Pages {
 public:
  explicit Pages(int64_t bytes) : bytes_(static_cast<size_t>(bytes + (4 << 20))) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED)
      throw Error(Code::kResourceExhausted,
                  fmt::format("cannot map {} MiB. Fix: --megabytes", bytes_ >> 20));
    madvise(data_, bytes_, MADV_HUGEPAGE);
  }
  ~Pages() { munmap(data_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  [[nodiscard]] std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  size_t bytes_;
  void* data_;
};

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

double seconds(bool cpu_time, const std::function<void()>& f) {
  const auto now = [&] {
    timespec t{};
    clock_gettime(cpu_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  };
  const double begin = now();
  f();
  return now() - begin;
}

// Packed layers whose scales are small numbers and whose codes are anything (packing is not what is
// measured): the parameters are read as often as the codes.
void fill(std::byte* memory, int64_t bytes) {
  auto* words = reinterpret_cast<uint32_t*>(memory);
  // As float, a number about 1e-3; as codes, varied.
  for (int64_t i = 0; i < bytes / 4; ++i)
    words[i] = 0x3a800000U | (static_cast<uint32_t>(i * 2654435761U >> 9) & 0x007f7f7fU);
}

void measure(const Arguments& a, const Format& format, int threads) {
  const ops::Isa isa = ops::choose_isa();
  const ops::cpu::Kernels* kernels = ops::cpu::kernels_of(isa);
  if (kernels == nullptr)
    throw Error(Code::kInvalidArgument, "PHALANX_CPU_ISA: the reference has nothing to measure");
  // Codes that become bf16 go by pairs on the path amx too.
  const ops::cpu::Kernels& codes =
      *ops::cpu::kernels_of(isa == ops::Isa::kAmx ? ops::Isa::kAvx512Bf16 : isa);
  const ops::cpu::IntegerKernels& integers = *ops::cpu::integer_kernels_of(isa);
  const auto layout = [&](int64_t rows, int64_t k) {
    return ops::PackedLinear{.rows = rows, .k = k, .dtype = DType::kBF16, .isa = isa,
                             .storage = format.storage, .group = format.group == 0 ? k : format.group,
                             .zeros = format.storage == Storage::kCodes8};
  };
  const int64_t layer_bytes =
      ops::packed_bytes(layout(kQkv, kHidden)) + ops::packed_bytes(layout(kHidden, kHidden)) +
      ops::packed_bytes(layout(2 * kIntermediate, kHidden)) +
      ops::packed_bytes(layout(kHidden, kIntermediate));
  const int64_t layers = std::max<int64_t>(2, (a.megabytes << 20) / layer_bytes);
  const Pages memory(layer_bytes * layers);
  fill(memory.data(), layer_bytes * layers);
  std::byte* at = memory.data();
  const auto place = [&](int64_t rows, int64_t k) {
    ops::PackedLinear w = layout(rows, k);
    w.data = at;
    at += ops::packed_bytes(w);
    return w;
  };
  std::vector<Layer> model(static_cast<size_t>(layers));
  for (Layer& l : model) {
    l.qkv = place(kQkv, kHidden);
    l.o = place(kHidden, kHidden);
    l.gate_up = {.panels = place(2 * kIntermediate, kHidden), .rows = kIntermediate};
    l.down = place(kHidden, kIntermediate);
  }
  ThreadPool pool({.threads = threads, .spin_us = 200});
  const int64_t most = *std::max_element(a.tokens.begin(), a.tokens.end());
  ops::Context ctx({.isa = isa, .max_tokens = most, .max_k = kIntermediate,
                    .max_rows = 2 * kIntermediate, .max_heads = 1, .max_head_dim = 64,
                    .max_context = 128, .quantised = true},
                   pool);
  const Pages x(most * kIntermediate * 2);
  const Pages y(most * kIntermediate * 2);
  auto* in = reinterpret_cast<uint16_t*>(x.data());
  for (int64_t i = 0; i < most * kIntermediate; ++i)
    in[i] = static_cast<uint16_t>(0x3c00 + ((i * 2654435761U >> 20) & 0xff) + ((i & 1) << 15));

  const auto bandwidth = [&] {
    const int64_t piece = layer_bytes * layers / threads / 4096 * 4096;
    std::atomic<float> sink{0};
    return static_cast<double>(piece * threads) / seconds(a.cpu_time, [&] {
             pool.run([&](int t) {
               sink.store(kernels->read(reinterpret_cast<const float*>(memory.data() + t * piece),
                                        piece),
                          std::memory_order_relaxed);
             });
           });
  };
  const auto peak = [&] {
    std::atomic<int64_t> operations{0};
    const double s = seconds(a.cpu_time, [&] {
      pool.run([&](int) {
        operations += format.storage == Storage::kInt8 ? integers.peak(1'000'000)
                                                       : codes.peak(1'000'000, codes.pairs);
      });
    });
    return static_cast<double>(operations) / s;
  };
  for (const int64_t tokens : a.tokens) {
    const auto matrix = [&](const Pages& p, int64_t cols) {
      return MatrixView{p.data(), DType::kBF16, tokens, cols, cols};
    };
    const auto run = [&](const Layer& l) {
      ops::linear(ctx, matrix(x, kHidden), l.qkv, nullptr, matrix(y, kQkv));
      ops::linear(ctx, matrix(x, kHidden), l.o, nullptr, matrix(y, kHidden));
      ops::gated_linear(ctx, matrix(x, kHidden), l.gate_up, nullptr, nullptr,
                        matrix(y, kIntermediate));
      ops::linear(ctx, matrix(x, kIntermediate), l.down, nullptr, matrix(y, kHidden));
    };
    const int64_t passes = tokens > 64 ? 1 : layers;
    std::vector<double> read, best, time, of_read, of_best;
    const double operations = 2.0 * static_cast<double>(kWeights * tokens);
    for (int r = 0; r < a.rounds; ++r) {
      const double b = bandwidth();
      const double p = peak();
      const double s = seconds(a.cpu_time, [&] {
                         for (int64_t l = 0; l < passes; ++l) run(model[static_cast<size_t>(l)]);
                       }) /
                       static_cast<double>(passes);
      const double b2 = bandwidth();
      const double p2 = peak();
      read.push_back((b + b2) / 2);
      best.push_back((p + p2) / 2);
      time.push_back(s);
      of_read.push_back(static_cast<double>(layer_bytes) / s / read.back());
      of_best.push_back(operations / s / best.back());
    }
    const double s = median(time);
    fmt::print("| {} | {} | {} | {:.1f} | {:.0f} | {:.3f} | {:.1f} | {:.0f} | {:.2f} | {:.2f} |\n",
               format.name, threads, tokens, median(read) * 1e-9, median(best) * 1e-9, s * 1e3,
               static_cast<double>(layer_bytes) / s * 1e-9, operations / s * 1e-9, median(of_read),
               median(of_best));
    std::fflush(stdout);
  }
}

int usable_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof set, &set) == 0 ? std::max(1, CPU_COUNT(&set)) : 1;
}

}  // namespace

int bench_quant(int argc, char** argv) {
  Arguments a;
  CLI::App app("Linear layers of quantised weights, 1B shape", "phalanx bench quant");
  std::vector<std::string> names;
  for (const Format& f : kFormats) names.emplace_back(f.name);
  app.add_option("--format", a.formats, "number formats (default: all)")
      ->delimiter(',')
      ->check(CLI::IsMember(names));
  app.add_option("--threads", a.threads, "thread counts (default: 1 and all)")
      ->delimiter(',')
      ->check(CLI::Range(1, 1024));
  app.add_option("--tokens", a.tokens, "tokens at once")->delimiter(',')->check(CLI::Range(1, 8192));
  app.add_option("--rounds", a.rounds, "interleaved rounds; medians are printed")
      ->check(CLI::Range(1, 1000));
  app.add_option("--megabytes", a.megabytes, "of weights, far beyond the caches")
      ->check(CLI::Range(16, 1 << 20));
  app.add_flag("--cpu-time", a.cpu_time,
               "measure CPU time instead of elapsed time: for a busy machine; one thread only");
  CLI11_PARSE(app, argc, argv);
  const int cpus = usable_cpus();
  if (a.threads.empty()) a.threads = cpus > 1 ? std::vector<int>{1, cpus} : std::vector<int>{1};
  if (a.cpu_time) a.threads = {1};
  if (a.formats.empty()) a.formats = names;
  fmt::print("quantised linear layers of the 1B shape (hidden 2048, intermediate 8192), {}, medians "
             "of {} interleaved rounds\nbytes: codes, scales and zero points; peak: of int8 products "
             "for w8a8, else of {} products\n\n"
             "| format | threads | tokens | read GB/s | peak Gop/s | ms/layer | GB/s | Gop/s | of "
             "bandwidth | of peak |\n|---|---|---|---|---|---|---|---|---|---|\n",
             ops::isa_name(ops::choose_isa()), a.rounds,
             ops::numeric_class_name(ops::numeric_class_of(ops::choose_isa())));
  for (const std::string& name : a.formats)
    for (const int threads : a.threads)
      measure(a, *std::find_if(std::begin(kFormats), std::end(kFormats),
                               [&](const Format& f) { return f.name == name; }),
              threads);
  return 0;
}

}  // namespace phalanx::apps
