#include "apps/bench_roofline.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "phalanx/base/clock.h"
#include "phalanx/base/error.h"
#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/cpu/kernels.h"

namespace phalanx::apps {
namespace {

constexpr int64_t kMemory = int64_t{512} << 20;
constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kPeakSteps = 1'000'000;

double layer_parameters(const models::ModelInfo& m) {
  const auto hidden = static_cast<double>(m.hidden_size);
  const auto heads = static_cast<double>(m.num_attention_heads * m.head_dim);
  const auto kv = static_cast<double>(m.num_key_value_heads * m.head_dim);
  return static_cast<double>(m.num_layers) *
         (hidden * (2 * heads + 2 * kv) + 3 * hidden * static_cast<double>(m.intermediate_size));
}

double head_parameters(const models::ModelInfo& m) {
  return static_cast<double>(m.hidden_size) * static_cast<double>(m.vocab_size);
}

// The embedding is read by rows, so its bytes count only where it is the head too.
double weight_bytes(const models::ModelInfo& m) {
  const double table = m.tied_embeddings
                           ? 0
                           : head_parameters(m) * static_cast<double>(tensor::dtype_bytes(m.dtype));
  return static_cast<double>(m.parameter_bytes) - table;
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v.empty() ? 0 : v[v.size() / 2];
}

// Of equal pieces of work.
double harmonic_mean(const std::vector<double>& speeds) {
  double time = 0;
  for (const double speed : speeds) time += 1 / speed;
  return time > 0 ? static_cast<double>(speeds.size()) / time : 0;
}

const ops::cpu::Kernels& kernels_of(ops::Isa isa) {
  const ops::cpu::Kernels* k = ops::cpu::kernels_of(isa);
  if (k == nullptr)
    throw Error(Code::kInvalidArgument,
                "PHALANX_CPU_ISA=ref: the reference has no peak to compare with. Fix: name another "
                "path or none");
  return *k;
}

}  // namespace

StepWork decode_work(const models::ModelInfo& m, int64_t batch, double context) {
  const auto sequences = static_cast<double>(batch);
  const double kv_bytes = 2.0 * static_cast<double>(m.num_layers) *
                          static_cast<double>(m.num_key_value_heads * m.head_dim) *
                          static_cast<double>(tensor::dtype_bytes(m.act)) * context;
  const double attention = 4.0 * static_cast<double>(m.num_layers) *
                           static_cast<double>(m.num_attention_heads * m.head_dim) * context;
  return {.bytes = weight_bytes(m) + sequences * kv_bytes,
          .flops = sequences * (2 * (layer_parameters(m) + head_parameters(m)) + attention)};
}

StepWork prefill_work(const models::ModelInfo& m, int64_t batch, int64_t prompt) {
  const auto tokens = static_cast<double>(prompt);
  const double attention = 4.0 * static_cast<double>(m.num_layers) *
                           static_cast<double>(m.num_attention_heads * m.head_dim) * tokens *
                           (tokens + 1) / 2;
  return {.bytes = weight_bytes(m),
          .flops = static_cast<double>(batch) *
                   (2 * layer_parameters(m) * tokens + 2 * head_parameters(m) + attention)};
}

Machine::Machine(int threads, const std::vector<int>& cpus, const models::ModelInfo& info)
    : pool_({.threads = threads, .cpus = cpus, .spin_us = 200}), isa_(ops::choose_isa()),
      memory_(static_cast<float*>(std::aligned_alloc(kHugePage, kMemory)), std::free) {
  if (memory_ == nullptr)
    throw Error(Code::kResourceExhausted, "bench: no 512 MiB of memory to measure bandwidth with");
  (void)::madvise(memory_.get(), kMemory, MADV_HUGEPAGE);
  pairs_ = kernels_of(isa_).pairs && info.act == tensor::DType::kBF16;
  // Written by the threads that will read it.
  const int64_t piece = kMemory / static_cast<int64_t>(sizeof(float)) / threads;
  pool_.run([&](int t) { std::fill_n(memory_.get() + t * piece, piece, 1.0f); });
}

void Machine::measure() {
  const ops::cpu::Kernels& k = kernels_of(isa_);
  const int64_t piece = kMemory / pool_.size() / 4096 * 4096;
  std::vector<float> sinks(static_cast<size_t>(pool_.size()) * 16);
  for (int round = 0; round < 3; ++round) {
    const int64_t begin = now_ns();
    pool_.run([&](int t) {
      sinks[static_cast<size_t>(t) * 16] =
          k.read(memory_.get() + t * piece / static_cast<int64_t>(sizeof(float)), piece);
    });
    const int64_t read = now_ns();
    std::atomic<int64_t> flops = 0;
    pool_.run([&](int) { flops += k.peak(kPeakSteps, pairs_); });
    const int64_t end = now_ns();
    bandwidths_.push_back(static_cast<double>(piece * pool_.size()) * 1e9 /
                          static_cast<double>(read - begin));
    peaks_.push_back(static_cast<double>(flops.load()) * 1e9 / static_cast<double>(end - read));
  }
}

double Machine::bytes_per_second() const { return median(bandwidths_); }
double Machine::flops_per_second() const { return median(peaks_); }

double Machine::steady_bytes_per_second() const { return harmonic_mean(bandwidths_); }
double Machine::steady_flops_per_second() const { return harmonic_mean(peaks_); }

Floor Machine::floor(const StepWork& work) const {
  const double memory = work.bytes / bytes_per_second();
  const double cores = work.flops / flops_per_second();
  return memory >= cores ? Floor{memory, "memory"} : Floor{cores, "cores"};
}

}  // namespace phalanx::apps
