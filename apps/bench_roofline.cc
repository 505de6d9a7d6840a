#include "apps/bench_roofline.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
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

// Elements of weights, of all layers, and of the head.
struct Parameters {
  double every_token = 0;  // multiplied with every token
  double expert = 0;       // one routed expert
  double head = 0;
};

double expert_layers(const models::ModelInfo& m) {
  return static_cast<double>(std::count(m.experts.in_layer.begin(), m.experts.in_layer.end(), true));
}

double attention_parameters(const models::ModelInfo& m) {
  const auto hidden = static_cast<double>(m.hidden_size);
  const auto heads = static_cast<double>(m.num_attention_heads);
  const models::LatentAttention& l = m.latent;
  if (l.kv_lora_rank == 0)
    return static_cast<double>(m.head_dim) * hidden *
           (2 * heads + 2 * static_cast<double>(m.num_key_value_heads));
  const auto query = static_cast<double>(l.qk_nope_head_dim + l.qk_rope_head_dim);
  const auto value = static_cast<double>(l.v_head_dim);
  const auto row = static_cast<double>(l.kv_lora_rank);
  const auto q_rank = static_cast<double>(l.q_lora_rank);
  return (q_rank > 0 ? q_rank * (hidden + heads * query) : hidden * heads * query) +
         hidden * (row + static_cast<double>(l.qk_rope_head_dim)) +
         row * heads * (static_cast<double>(l.qk_nope_head_dim) + value) + heads * value * hidden;
}

Parameters parameters(const models::ModelInfo& m) {
  const auto hidden = static_cast<double>(m.hidden_size);
  const models::Experts& e = m.experts;
  const auto layers = static_cast<double>(m.num_layers);
  const double routed = expert_layers(m);
  return {.every_token = layers * attention_parameters(m) +
                         (layers - routed) * 3 * hidden * static_cast<double>(m.intermediate_size) +
                         routed * hidden *
                             (static_cast<double>(e.count) +
                              3 * static_cast<double>(e.shared_intermediate_size)),
          .expert = 3 * hidden * static_cast<double>(e.intermediate_size),
          .head = hidden * static_cast<double>(m.vocab_size)};
}

// Of one element of the experts, scales included.
double expert_element_bytes(const models::ModelInfo& m) {
  const auto stored = static_cast<double>(tensor::dtype_bytes(m.dtype));
  if (m.formats == nullptr) return stored;
  const models::Experts& e = m.experts;
  const auto layer = std::find(e.in_layer.begin(), e.in_layer.end(), true) - e.in_layer.begin();
  const quant::LinearFormat* format = m.formats->find(
      fmt::format("model.layers.{}.{}.experts.0.{}", layer, e.block, e.down));
  if (format == nullptr || format->scheme == quant::Scheme::kFloat) return stored;
  const double scales =
      format->group == 0 ? 0
                         : static_cast<double>(tensor::dtype_bytes(format->scale_dtype)) /
                               static_cast<double>(format->group * format->block_rows);
  return format->bits / 8.0 + scales;
}

// Experts of a layer that no token is sent to.
double idle_experts(const models::Experts& e, double tokens) {
  if (e.count == 0) return 0;
  const auto count = static_cast<double>(e.count);
  return count * std::pow(1 - static_cast<double>(e.per_token) / count, tokens);
}

// The embedding is read by rows, so its bytes count only where it is the head too.
double weight_bytes(const models::ModelInfo& m, double tokens) {
  const Parameters p = parameters(m);
  const double table =
      m.tied_embeddings ? 0 : p.head * static_cast<double>(tensor::dtype_bytes(m.dtype));
  const double idle =
      expert_layers(m) * idle_experts(m.experts, tokens) * p.expert * expert_element_bytes(m);
  return std::max(static_cast<double>(m.parameter_bytes) - table - idle, 0.0);
}

// Of one token but for attention and the head.
double token_flops(const models::ModelInfo& m) {
  const Parameters p = parameters(m);
  return 2 * (p.every_token +
              expert_layers(m) * static_cast<double>(m.experts.per_token) * p.expert);
}

// Of one query with one position, all layers: over the compressed rows where keys are values.
double position_flops(const models::ModelInfo& m) {
  const double width = m.latent.kv_lora_rank > 0
                           ? static_cast<double>(2 * m.latent.kv_lora_rank + m.latent.qk_rope_head_dim)
                           : 2 * static_cast<double>(m.head_dim);
  return 2 * static_cast<double>(m.num_layers * m.num_attention_heads) * width;
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

double kv_bytes_per_position(const models::ModelInfo& m, models::KvDtype kv) {
  const models::ModelOptions one{.max_step_tokens = 1, .max_step_rows = 1, .max_sequence = 1,
                                 .kv = kv, .weights = {1}};
  return static_cast<double>(models::memory_need(m, one).kv_bytes_per_block) /
         static_cast<double>(one.block_size);
}

StepWork decode_work(const models::ModelInfo& m, double kv_bytes, int64_t batch, double context) {
  const auto sequences = static_cast<double>(batch);
  return {.bytes = weight_bytes(m, sequences) + sequences * kv_bytes * context,
          .flops = sequences *
                   (token_flops(m) + 2 * parameters(m).head + position_flops(m) * context)};
}

StepWork prefill_work(const models::ModelInfo& m, int64_t batch, int64_t prompt) {
  const auto tokens = static_cast<double>(prompt);
  const auto prompts = static_cast<double>(batch);
  // Keys and values of the heads themselves may take fewer operations than compressed rows.
  const models::LatentAttention& l = m.latent;
  const double own = 2 * static_cast<double>(m.num_layers * m.num_attention_heads) *
                     static_cast<double>(l.qk_nope_head_dim + l.qk_rope_head_dim + l.v_head_dim);
  const double position = l.kv_lora_rank > 0 ? std::min(own, position_flops(m)) : position_flops(m);
  return {.bytes = weight_bytes(m, prompts * tokens),
          .flops = prompts * (token_flops(m) * tokens + 2 * parameters(m).head +
                              position * tokens * (tokens + 1) / 2)};
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
