#include "apps/bench_kernels.h"

#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/ops/cpu/amx.h"
#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/cpu/kernels.h"
#include "phalanx/ops/ops.h"
#include "phalanx/ops/packing.h"

namespace phalanx::apps {
namespace {

using ops::Isa;
using ops::MatrixView;
using tensor::DType;

struct Options {
  std::vector<int> threads;  // empty: 1 and all
  std::vector<int> cpus;     // to pin to; empty: the process's first ones
  std::string isa;           // empty: the best
  std::string dtype = "bf16";
  int rounds = 5;
  int64_t megabytes = 512;
  std::vector<int64_t> tokens;  // of gemm and attention; empty: all
  bool cpu_time = false;     // of the calling thread: for one thread on a busy machine
};

// Usable CPUs of this process, in order.
std::vector<int> usable_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int c = 0; c < CPU_SETSIZE; ++c)
      if (CPU_ISSET(c, &set)) cpus.push_back(c);
  if (cpus.empty()) cpus.push_back(0);
  return cpus;
}

Isa isa_named(const std::string& name) {
  if (name.empty()) return ops::choose_isa();
  std::string names;
  for (const Isa isa : ops::available_isas()) {
    if (ops::isa_name(isa) == name) return isa;
    names += (names.empty() ? "" : ", ") + std::string(ops::isa_name(isa));
  }
  throw Error(Code::kInvalidArgument,
              "--isa: found \"" + name + "\", expected one of " + names);
}

Options parse(int argc, char** argv, const std::string& what) {
  CLI::App app(what);
  Options o;
  app.add_option("--threads", o.threads, "thread counts (default: 1 and all)")->delimiter(',');
  app.add_option("--cpus", o.cpus, "CPUs to pin to (default: all usable)")->delimiter(',');
  app.add_option("--isa", o.isa, "kernel path (default: PHALANX_CPU_ISA or the best)");
  app.add_option("--dtype", o.dtype, "weights: bf16, f16, f32; KV cache: bf16, f32, i8")
      ->check(CLI::IsMember({"bf16", "f16", "f32", "i8"}));
  app.add_option("--rounds", o.rounds, "interleaved rounds; medians are printed")
      ->check(CLI::Range(1, 1000));
  app.add_option("--tokens", o.tokens, "gemm and attention: tokens at once (attention: of 1, 512, 2048)")
      ->delimiter(',')
      ->check(CLI::Range(1, 2048));
  app.add_option("--megabytes", o.megabytes, "memory to read, far beyond the caches")
      ->check(CLI::Range(16, 1 << 20));
  app.add_flag("--cpu-time", o.cpu_time,
               "measure CPU time instead of elapsed time: for a busy machine; one thread only");
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    std::printf("%s", app.help().c_str());
    throw;
  } catch (const CLI::ParseError& e) {
    throw Error(Code::kInvalidArgument, std::string(argv[0]) + ": " + e.what());
  }
  if (o.cpus.empty()) o.cpus = usable_cpus();
  const auto all = static_cast<int>(o.cpus.size());
  if (o.threads.empty()) o.threads = all > 1 ? std::vector<int>{1, all} : std::vector<int>{1};
  if (o.cpu_time) o.threads = {1};
  for (const int t : o.threads)
    if (t < 1 || t > all)
      throw Error(Code::kInvalidArgument, "--threads: found " + std::to_string(t) +
                                              ", expected 1 to " + std::to_string(all) +
                                              " (the usable CPUs)");
  return o;
}

ThreadPool::Options pool_options(const Options& o, int threads) {
  return {.threads = threads,
          .cpus = std::vector<int>(o.cpus.begin(), o.cpus.begin() + threads),
          .spin_us = 200};
}

// Anonymous memory in huge pages where the system gives them.
class Pages {
 public:
  explicit Pages(int64_t bytes) : bytes_(static_cast<size_t>(bytes + (4 << 20))) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED)
      throw Error(Code::kResourceExhausted,
                  "cannot map " + std::to_string(bytes_ >> 20) + " MiB; try --megabytes");
    madvise(data_, bytes_, MADV_HUGEPAGE);
  }
  ~Pages() { munmap(data_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  [[nodiscard]] std::byte* data() const { return static_cast<std::byte*>(data_); }
  template <typename T>
  [[nodiscard]] T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  size_t bytes_;
  void* data_;
};

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

double seconds(const Options& o, const std::function<void()>& f) {
  auto now = [&] {
    timespec t{};
    clock_gettime(o.cpu_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  };
  const double begin = now();
  f();
  return now() - begin;
}

const ops::cpu::Kernels& kernels(Isa isa) {
  const ops::cpu::Kernels* k = ops::cpu::kernels_of(isa);
  if (k == nullptr)
    throw Error(Code::kInvalidArgument, "--isa: the reference has nothing to measure");
  return *k;
}

// Bytes per second of all threads reading `bytes` between them.
double read_bandwidth(const Options& o, ThreadPool& pool, const ops::cpu::Kernels& k, const std::byte* memory,
                      int64_t bytes) {
  const int64_t piece = bytes / pool.size() / 4096 * 4096;
  std::vector<float> sinks(static_cast<size_t>(pool.size()) * 16);
  const double s = seconds(o, [&] {
    pool.run([&](int t) {
      sinks[static_cast<size_t>(t) * 16] =
          k.read(reinterpret_cast<const float*>(memory + t * piece), piece);
    });
  });
  return static_cast<double>(piece * pool.size()) / s;
}

double peak_flops(const Options& o, ThreadPool& pool, const ops::cpu::Kernels& k, bool pairs) {
  std::atomic<int64_t> flops = 0;
  const double s = seconds(o, [&] { pool.run([&](int) { flops += k.peak(2'000'000, pairs); }); });
  return static_cast<double>(flops) / s;
}

// The linear layers of one decoder layer of the 1B shape.
struct Layer {
  static constexpr int64_t kHidden = 2048;
  static constexpr int64_t kQkv = 3072;
  static constexpr int64_t kIntermediate = 8192;

  ops::PackedLinear qkv, o, down;
  ops::PackedGated gate_up;
};

constexpr int64_t layer_weights() {
  return Layer::kHidden * (Layer::kQkv + Layer::kHidden + 3 * Layer::kIntermediate);
}

// Weights with plausible values, made in place (packing is not what is measured).
void fill(std::byte* memory, int64_t bytes, DType dtype) {
  if (dtype == DType::kI8) {
    for (int64_t i = 0; i < bytes; ++i) memory[i] = static_cast<std::byte>(i * 2654435761u >> 20);
  } else if (dtype == DType::kF32) {
    auto* p = reinterpret_cast<float*>(memory);
    for (int64_t i = 0; i < bytes / 4; ++i)
      p[i] = (static_cast<float>((i * 2654435761u >> 20) & 0xff) - 127.5f) * 1e-4f;
  } else {
    auto* p = reinterpret_cast<uint16_t*>(memory);
    const uint16_t base = dtype == DType::kBF16 ? 0x3c00 : 0x2000;
    for (int64_t i = 0; i < bytes / 2; ++i)
      p[i] = static_cast<uint16_t>(base + ((i * 2654435761u >> 20) & 0xff) + ((i & 1) << 15));
  }
}

DType dtype_named(const std::string& name) {
  return name == "bf16"  ? DType::kBF16
         : name == "f16" ? DType::kF16
         : name == "i8"  ? DType::kI8
                         : DType::kF32;
}

struct Activations {
  Activations(int64_t tokens, DType act)
      : x(tokens * Layer::kIntermediate * 4), y(tokens * Layer::kIntermediate * 4) {
    fill(x.data(), tokens * Layer::kIntermediate * static_cast<int64_t>(dtype_bytes(act)), act);
    this->tokens = tokens;
    this->act = act;
  }
  [[nodiscard]] MatrixView in(int64_t cols) const { return {x.data(), act, tokens, cols, cols}; }
  [[nodiscard]] MatrixView out(int64_t cols) const { return {y.data(), act, tokens, cols, cols}; }
  Pages x, y;
  int64_t tokens = 0;
  DType act = DType::kBF16;
};

void run_layer(ops::Context& ctx, const Layer& layer, const Activations& a) {
  ops::linear(ctx, a.in(Layer::kHidden), layer.qkv, nullptr, a.out(Layer::kQkv));
  ops::linear(ctx, a.in(Layer::kHidden), layer.o, nullptr, a.out(Layer::kHidden));
  ops::gated_linear(ctx, a.in(Layer::kHidden), layer.gate_up, nullptr, nullptr,
                    a.out(Layer::kIntermediate));
  ops::linear(ctx, a.in(Layer::kIntermediate), layer.down, nullptr, a.out(Layer::kHidden));
}

// A paged KV cache of `sequences` sequences of `context` positions, 8 heads of 64.
struct Cache {
  static constexpr int64_t kKvHeads = 8;
  static constexpr int64_t kGroup = 4;
  static constexpr int64_t kHeadDim = 64;
  static constexpr int64_t kBlock = 128;

  Cache(int64_t sequences, int64_t context, DType dtype)
      : blocks((context + kBlock - 1) / kBlock),
        bytes(sequences * blocks * kBlock * kKvHeads * kHeadDim *
              static_cast<int64_t>(tensor::dtype_bytes(dtype))),
        k(bytes),
        v(bytes),
        table(static_cast<size_t>(sequences * blocks)) {
    fill(k.data(), bytes, dtype);
    fill(v.data(), bytes, dtype);
    scales.assign(static_cast<size_t>(kKvHeads * kHeadDim), 0.01f);
    std::iota(table.begin(), table.end(), 0);
    layer = {.k = k.data(),
             .v = v.data(),
             .dtype = dtype,
             .blocks = sequences * blocks,
             .block_size = kBlock,
             .kv_heads = kKvHeads,
             .head_dim = kHeadDim};
    if (dtype == DType::kI8) layer.k_scale = layer.v_scale = scales.data();
  }
  int64_t blocks;
  int64_t bytes;
  Pages k, v;
  std::vector<int32_t> table;
  std::vector<float> scales;  // of int8
  ops::KvLayer layer;
};

template <typename Run>
int guarded(int argc, char** argv, const std::string& what, Run run) {
  Options o;
  try {
    o = parse(argc, argv, what);
  } catch (const CLI::CallForHelp&) {
    return 0;
  }
  run(o);
  return 0;
}

}  // namespace

int bench_memory(int argc, char** argv) {
  return guarded(argc, argv, "Read bandwidth of 1 to n threads", [](Options o) {
    const Isa isa = isa_named(o.isa);
    const int64_t bytes = o.megabytes << 20;
    const Pages memory(bytes);
    fill(memory.data(), bytes, DType::kF32);
    std::printf("read bandwidth, %lld MiB, %s, median of %d\n\n| threads | GB/s | min | max |\n"
                "|---|---|---|---|\n",
                static_cast<long long>(o.megabytes), isa_name(isa).data(), o.rounds);
    for (int threads = 1; threads <= (o.cpu_time ? 1 : static_cast<int>(o.cpus.size()));
         ++threads) {
      ThreadPool pool(pool_options(o, threads));
      std::vector<double> rates;
      for (int r = 0; r < o.rounds; ++r)
        rates.push_back(read_bandwidth(o, pool, kernels(isa), memory.data(), bytes) * 1e-9);
      std::printf("| %d | %.1f | %.1f | %.1f |\n", threads, median(rates),
                  *std::min_element(rates.begin(), rates.end()),
                  *std::max_element(rates.begin(), rates.end()));
    }
  });
}

int bench_flops(int argc, char** argv) {
  return guarded(argc, argv, "Peak of each kernel path", [](Options o) {
    std::printf("peak, median of %d\n\n| path | product | threads | GFLOP/s |\n|---|---|---|---|\n",
                o.rounds);
    for (const Isa isa : ops::available_isas()) {
      if (isa == Isa::kRef) continue;
      const bool pairs = kernels(isa).pairs;
      const char* product = isa == Isa::kAmx ? "bf16 tiles" : pairs ? "bf16 pairs" : "f32";
      for (const int threads : o.threads) {
        ThreadPool pool(pool_options(o, threads));
        std::vector<double> rates;
        for (int r = 0; r < o.rounds; ++r)
          rates.push_back(peak_flops(o, pool, kernels(isa), pairs) * 1e-9);
        std::printf("| %s | %s | %d | %.0f |\n", isa_name(isa).data(), product, threads,
                    median(rates));
      }
    }
    if (!ops::cpu::amx_refusal().empty())
      std::printf("| amx | bf16 tiles | | not run: %s |\n", ops::cpu::amx_refusal().c_str());
  });
}

int bench_gemm(int argc, char** argv) {
  return guarded(argc, argv, "Linear layers of a 1B model", [](Options o) {
    if (o.isa == isa_name(Isa::kAmx) && !ops::cpu::amx_refusal().empty()) {
      std::printf("amx: not run: %s\n", ops::cpu::amx_refusal().c_str());
      return;
    }
    const Isa isa = isa_named(o.isa);
    const DType dtype = dtype_named(o.dtype);
    if (dtype == DType::kI8)
      throw Error(Code::kInvalidArgument,
                  "--dtype: found \"i8\", expected bf16, f16 or f32 for linear layers");
    const DType act = dtype == DType::kBF16 ? DType::kBF16 : DType::kF32;
    const bool pairs = kernels(isa).pairs && dtype == DType::kBF16;
    const int64_t layer_bytes = layer_weights() * static_cast<int64_t>(dtype_bytes(dtype));
    const int64_t layers = std::max<int64_t>(2, (o.megabytes << 20) / layer_bytes);
    const Pages memory(layer_bytes * layers);
    fill(memory.data(), layer_bytes * layers, dtype);
    std::vector<Layer> model(static_cast<size_t>(layers));
    std::byte* at = memory.data();
    auto linear = [&](int64_t rows, int64_t k) {
      const ops::PackedLinear w{at, rows, k, dtype, isa};
      at += ops::packed_bytes(rows, k, dtype, isa);
      return w;
    };
    for (Layer& l : model) {
      l.qkv = linear(Layer::kQkv, Layer::kHidden);
      l.o = linear(Layer::kHidden, Layer::kHidden);
      l.gate_up = {linear(2 * Layer::kIntermediate, Layer::kHidden), Layer::kIntermediate};
      l.down = linear(Layer::kHidden, Layer::kIntermediate);
    }
    std::printf("linear layers of the 1B shape (hidden 2048, intermediate 8192), %s, %s weights, "
                "medians of %d interleaved rounds\n"
                "roofline: the longer of weight bytes / read bandwidth and operations / peak\n\n"
                "| threads | tokens | read GB/s | peak GFLOP/s | ms/layer | GB/s | GFLOP/s | of "
                "bandwidth | of peak | of roofline |\n|---|---|---|---|---|---|---|---|---|---|\n",
                isa_name(isa).data(), tensor::dtype_name(dtype).data(), o.rounds);
    for (const int threads : o.threads) {
      ThreadPool pool(pool_options(o, threads));
      ops::Context ctx({.isa = isa,
                        .max_tokens = 2048,
                        .max_k = Layer::kIntermediate,
                        .max_rows = 2 * Layer::kIntermediate,
                        .max_heads = 32,
                        .max_head_dim = 64,
                        .max_context = 4096},
                       pool);
      const std::vector<int64_t> all{1, 2, 4, 8, 16, 32, 64, 512, 2048};
      for (const int64_t tokens : o.tokens.empty() ? all : o.tokens) {
        const Activations a(tokens, act);
        const int64_t passes = tokens > 64 ? 1 : layers;
        std::vector<double> bw, peak, time, of_bw, of_peak, of_roof;
        for (int r = 0; r < o.rounds; ++r) {
          const double b = read_bandwidth(o, pool, kernels(isa), memory.data(), layer_bytes * layers);
          const double p = peak_flops(o, pool, kernels(isa), pairs);
          const double s = seconds(o, [&] {
                             for (int64_t l = 0; l < passes; ++l)
                               run_layer(ctx, model[static_cast<size_t>(l)], a);
                           }) /
                           static_cast<double>(passes);
          const double p2 = peak_flops(o, pool, kernels(isa), pairs);
          const double b2 =
              read_bandwidth(o, pool, kernels(isa), memory.data(), layer_bytes * layers);
          const double flops = 2.0 * static_cast<double>(layer_weights() * tokens);
          bw.push_back((b + b2) / 2);
          peak.push_back((p + p2) / 2);
          time.push_back(s);
          of_bw.push_back(static_cast<double>(layer_bytes) / s / bw.back());
          of_peak.push_back(flops / s / peak.back());
          of_roof.push_back(
              std::max(static_cast<double>(layer_bytes) / bw.back(), flops / peak.back()) / s);
        }
        const double s = median(time);
        std::printf("| %d | %lld | %.1f | %.0f | %.3f | %.1f | %.0f | %.2f | %.2f | %.2f |\n",
                    threads, static_cast<long long>(tokens), median(bw) * 1e-9,
                    median(peak) * 1e-9, s * 1e3, static_cast<double>(layer_bytes) / s * 1e-9,
                    2e-9 * static_cast<double>(layer_weights() * tokens) / s, median(of_bw),
                    median(of_peak), median(of_roof));
        std::fflush(stdout);
      }
    }
  });
}

int bench_attention(int argc, char** argv) {
  return guarded(argc, argv, "Attention of a 1B model", [](Options o) {
    const Isa isa = isa_named(o.isa);
    const DType dtype = dtype_named(o.dtype);
    if (dtype == DType::kF16)
      throw Error(Code::kInvalidArgument,
                  "--dtype: found \"f16\", expected bf16, f32 or i8 for the KV cache");
    const DType act = dtype == DType::kF32 ? DType::kF32 : DType::kBF16;
    const bool pairs = kernels(isa).pairs && act == DType::kBF16;
    constexpr int64_t kHeads = Cache::kKvHeads * Cache::kGroup;
    std::printf("attention of the 1B shape (32 heads of 64, 8 KV heads, blocks of 128), %s, %s KV, "
                "medians of %d interleaved rounds\n"
                "decode: KV bytes against read bandwidth; prefill: operations of the causal half "
                "against the %s peak\n\n"
                "| threads | sequences | tokens | context | us | floor us | ratio |\n"
                "|---|---|---|---|---|---|---|\n",
                isa_name(isa).data(), tensor::dtype_name(dtype).data(), o.rounds,
                pairs ? "bf16 pairs" : "f32");
    for (const int threads : o.threads) {
      ThreadPool pool(pool_options(o, threads));
      ops::Context ctx({.isa = isa,
                        .max_tokens = 2048,
                        .max_k = 2048,
                        .max_rows = 3072,
                        .max_heads = kHeads,
                        .max_head_dim = Cache::kHeadDim,
                        .max_context = 32768},
                       pool);
      struct Case {
        int64_t sequences, tokens, context;
      };
      for (const Case c : {Case{1, 1, 16}, {1, 1, 512}, {1, 1, 8192}, {1, 1, 32768}, {32, 1, 256},
                           {32, 1, 2048}, {1, 512, 512}, {1, 2048, 2048}}) {
        if (!o.tokens.empty() &&
            std::find(o.tokens.begin(), o.tokens.end(), c.tokens) == o.tokens.end())
          continue;
        Cache cache(c.sequences, c.context, dtype);
        const int64_t rows = c.sequences * c.tokens;
        const int64_t width = kHeads * Cache::kHeadDim;
        const Pages q(rows * width * 4);
        const Pages y(rows * width * 4);
        fill(q.data(), rows * width * static_cast<int64_t>(dtype_bytes(act)), act);
        const MatrixView in{q.data(), act, rows, width, width};
        const MatrixView out{y.data(), act, rows, width, width};
        std::vector<ops::SequenceSlice> slices;
        for (int64_t s = 0; s < c.sequences; ++s)
          slices.push_back({static_cast<int32_t>(s * c.tokens), static_cast<int32_t>(c.tokens),
                            static_cast<int32_t>(c.context),
                            cache.table.data() + s * cache.blocks});
        const ops::AttentionShape shape{.q_heads = kHeads,
                                        .group = Cache::kGroup,
                                        .head_dim = Cache::kHeadDim,
                                        .scale = 0.125f};
        const Pages other(256 << 20);
        fill(other.data(), 256 << 20, DType::kF32);
        std::vector<double> time, floor, ratio;
        for (int r = 0; r < o.rounds; ++r) {
          double least = 0;
          if (c.tokens == 1) {
            // Also drives the KV cache out of the caches.
            const double b = read_bandwidth(o, pool, kernels(isa), other.data(), 256 << 20);
            least = 2.0 * static_cast<double>(cache.bytes) / static_cast<double>(cache.blocks * Cache::kBlock) *
                    static_cast<double>(c.context) / b;
          } else {
            const double positions = static_cast<double>(c.tokens) *
                                     static_cast<double>(2 * c.context - c.tokens + 1) / 2;
            // On the path amx too, attention goes by pairs.
            least = 4.0 * positions * static_cast<double>(width) /
                    peak_flops(o, pool, kernels(isa == Isa::kAmx ? Isa::kAvx512Bf16 : isa), pairs);
          }
          const double s = seconds(o, [&] { ops::attention(ctx, in, slices, shape, cache.layer, out); });
          time.push_back(s);
          floor.push_back(least);
          ratio.push_back(least / s);
        }
        std::printf("| %d | %lld | %lld | %lld | %.0f | %.0f | %.2f |\n", threads,
                    static_cast<long long>(c.sequences), static_cast<long long>(c.tokens),
                    static_cast<long long>(c.context), median(time) * 1e6, median(floor) * 1e6,
                    median(ratio));
        std::fflush(stdout);
      }
    }
  });
}

}  // namespace phalanx::apps
