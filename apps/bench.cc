#include "apps/bench.h"

#include <fmt/format.h>

#include <cstdio>
#include <string_view>

#include "apps/bench_barrier.h"
#include "apps/bench_collectives.h"
#include "apps/bench_engine.h"
#include "apps/bench_kernels.h"
#include "apps/bench_load.h"
#include "apps/bench_serve.h"
#include "apps/bench_perplexity.h"
#include "apps/bench_quant.h"

namespace phalanx::apps {
namespace {

struct Bench {
  std::string_view name;
  int (*run)(int, char**);
  std::string_view summary;
};

constexpr Bench kBenches[] = {
    {"mem", bench_memory, "read bandwidth of 1..n threads"},
    {"flops", bench_flops, "peak of each kernel path"},
    {"barrier", bench_barrier, "an empty parallel region of the thread pool"},
    {"gemm", bench_gemm, "linear layers against bandwidth and peak"},
    {"quant", bench_quant, "quantised linear layers against bandwidth and peak"},
    {"attention", bench_attention, "decode and prefill attention"},
    {"collectives", bench_collectives, "all_gather and all_reduce against raw floors"},
    {"engine", bench_engine, "prefill and decode of a model on this machine's ranks"},
    {"serve", bench_serve, "load against an endpoint: first token, inter-token, throughput"},
    {"load", bench_load, "loading against plain reading and copying"},
    {"perplexity", bench_perplexity, "of a text under a checkpoint"},
};

}  // namespace

int bench_main(int argc, char** argv) {
  const std::string_view name = argc > 1 ? argv[1] : "";
  for (const Bench& bench : kBenches)
    if (bench.name == name) return bench.run(argc - 1, argv + 1);
  const bool asked = name == "--help" || name == "-h";
  std::FILE* out = asked ? stdout : stderr;
  if (!asked) fmt::print(out, "phalanx: unknown benchmark '{}'\n", name);
  fmt::print(out, "usage: phalanx bench <what> [options]\n\n");
  for (const Bench& bench : kBenches) fmt::print(out, "  {:<14} {}\n", bench.name, bench.summary);
  return asked ? 0 : 2;
}

}  // namespace phalanx::apps
