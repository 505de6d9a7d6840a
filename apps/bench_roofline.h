#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "phalanx/base/thread_pool.h"
#include "phalanx/models/model.h"
#include "phalanx/ops/isa.h"

namespace phalanx::apps {

// What a step of a model must at least move and compute, on all ranks together. Of experts, those
// that so many tokens are expected to be sent to, if each is as likely as the others.
struct StepWork {
  double bytes = 0;  // weights once, and the KV cache of every sequence
  double flops = 0;
};

// Of all layers, each head stored once.
[[nodiscard]] double kv_bytes_per_position(const models::ModelInfo& info, models::KvDtype kv);
// `batch` sequences decode one token each at this context (positions in the cache of
// `kv_bytes` each).
[[nodiscard]] StepWork decode_work(const models::ModelInfo& info, double kv_bytes, int64_t batch,
                                   double context);
// `batch` prompts are computed from their first token; activations and the KV cache fit in caches.
[[nodiscard]] StepWork prefill_work(const models::ModelInfo& info, int64_t batch, int64_t prompt);

struct Floor {
  double seconds = 0;
  std::string_view bound;  // "memory" or "cores": which of the two takes longer
};

// What this many threads can read and compute, measured now: to be asked for again beside every
// measurement, because a shared machine changes.
class Machine {
 public:
  // Takes 512 MiB. cpus: one per thread to pin to; empty: not pinned.
  Machine(int threads, const std::vector<int>& cpus, const models::ModelInfo& info);
  // Repeats the measurement; the medians over all repetitions so far count.
  void measure();
  [[nodiscard]] double bytes_per_second() const;
  [[nodiscard]] double flops_per_second() const;
  // All that was read or computed by the time it took, gaps on a shared machine included.
  [[nodiscard]] double steady_bytes_per_second() const;
  [[nodiscard]] double steady_flops_per_second() const;
  [[nodiscard]] Floor floor(const StepWork& work) const;

 private:
  ThreadPool pool_;
  ops::Isa isa_;
  bool pairs_ = false;
  std::unique_ptr<float, void (*)(void*)> memory_;
  std::vector<double> bandwidths_, peaks_;
};

}  // namespace phalanx::apps
