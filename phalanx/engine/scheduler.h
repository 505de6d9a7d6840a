#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "phalanx/engine/block_pool.h"
#include "phalanx/engine/prefill_pace.h"
#include "phalanx/engine/sequence.h"
#include "phalanx/engine/step_plan.h"

namespace phalanx::engine {

struct SchedulerOptions {
  int64_t block_size = 128;
  int64_t blocks = 0;
  int64_t max_batch = 0;           // sequences running
  int64_t max_prefill_batch = 0;   // sequences in prefill in one step
  int64_t max_prefill_tokens = 0;  // prompt tokens in one step
  int64_t max_step_tokens = 0;     // all tokens in one step, >= max_batch
  bool share_prefixes = false;
  double decode_stretch = 0;       // PrefillPace; 0: no bound
};

// Who computes what in the next step. First come, first served.
//
// A step holds one token of every sequence that decodes, and, in what is left of max_step_tokens,
// prompts: those begun first, then waiting ones as long as blocks, max_batch and the prefill limits
// allow. So a prompt is computed as early as possible and decoding never stops for it. A prompt
// longer than its share is computed over several steps; beside sequences that decode that share is
// what PrefillPace allows, unless all of them began after the prompt had come: a burst of prompts
// is computed at full speed.
//
// A sequence begins with the blocks that are published for its first tokens, and publishes its own
// as they fill. The last token is always computed, for its logits.
//
// A waiting sequence enters when all blocks of its tokens are free; after that it takes one block
// at a time. When none is free, the youngest running sequence gives its blocks up and goes back to
// the head of the queue, to be computed again from its first token; since its tokens stay and
// sampling depends on (seed, position) alone, its output does not change. The oldest always
// advances, because every accepted sequence fits the pool alone.
//
// One thread; no allocation in plan() once the vectors have grown.
class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions& options);

  // Joins the queue; tags rise.
  void add(std::unique_ptr<Sequence> sequence);
  // Writes the next step's sequences. Returns false when there is nothing to compute.
  bool plan(StepPlanWriter& writer);
  // Sequences whose logits the plan asks for, in the order of its rows.
  [[nodiscard]] std::span<Sequence* const> sampled() const { return sampled_; }
  // The planned step has been computed in `ns` (0: unknown).
  void advance(int64_t ns);
  // Moves the finished ones out; their blocks return.
  void collect(std::vector<std::unique_ptr<Sequence>>& finished);

  template <typename Visit>
  void for_each(Visit&& visit) {
    for (auto& s : running_) visit(*s);
    for (auto& s : waiting_) visit(*s);
  }
  [[nodiscard]] bool empty() const { return running_.empty() && waiting_.empty(); }
  [[nodiscard]] int64_t running() const { return std::ssize(running_); }
  [[nodiscard]] int64_t waiting() const { return std::ssize(waiting_); }
  [[nodiscard]] const BlockPool& pool() const { return pool_; }
  [[nodiscard]] uint64_t preemptions() const { return preemptions_; }
  // Prompt tokens that did not have to be computed.
  [[nodiscard]] uint64_t cached_tokens() const { return cached_tokens_; }

 private:
  [[nodiscard]] int64_t blocks_for(int64_t tokens) const;
  bool make_room();
  void preempt_youngest();
  [[nodiscard]] bool take_blocks(Sequence& sequence);
  void publish(Sequence& sequence);
  [[nodiscard]] int64_t share_of(const Sequence& prompt) const;
  void admit(int64_t prefills, int64_t budget);

  SchedulerOptions options_;
  BlockPool pool_;
  // Both in order of tags, and every running one is older than every waiting one.
  std::vector<std::unique_ptr<Sequence>> running_;
  std::deque<std::unique_ptr<Sequence>> waiting_;
  std::vector<Sequence*> sampled_;
  PrefillPace pace_;
  // Of the step being planned.
  int64_t decodes_ = 0, prompt_tokens_ = 0;
  int64_t first_begun_ns_ = 0;  // when the oldest of those that decode got its first token
  uint64_t preemptions_ = 0, cached_tokens_ = 0;
};

}  // namespace phalanx::engine
