#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "phalanx/engine/block_pool.h"
#include "phalanx/engine/draft_order.h"
#include "phalanx/engine/draft_pace.h"
#include "phalanx/engine/engine_options.h"
#include "phalanx/engine/prefill_pace.h"
#include "phalanx/engine/prompt_lookup.h"
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
  int64_t max_step_rows = 0;       // rows of logits in one step, >= max_batch
  bool share_prefixes = false;
  double decode_stretch = 0;       // PrefillPace; 0: no bound
  int64_t ageing_ns = 0;           // waiting so long raises a sequence by one priority; 0: never
  int64_t draft_batch = 0;         // drafts only while at most that many sequences decode; 0: none
  PromptLookup lookup = {};
  int64_t draft_model_tokens = 0;  // that a draft model computes in one step; 0: there is none, drafts
                                   // are looked up
};

// Rows of logits that a plan asks for: those of `count` neighbouring tokens of one sequence.
struct PlannedRows {
  Sequence* sequence = nullptr;
  int32_t position = 0;  // of the first token
  int32_t count = 0;
};

struct DraftCounts {
  uint64_t drafts = 0, tokens = 0, accepted = 0;
  std::array<uint64_t, kMostDraftTokens> accepted_by_place{};
};

// Who computes what in the next step. Higher priorities first; within one the clients that wait take
// turns, and each client's own are served as they came. A sequence that waits rises by one priority
// every ageing_ns, so that a stream of more urgent ones does not hold it up for ever.
//
// A step holds one token of every sequence that decodes, and, in what is left of max_step_tokens,
// prompts: those begun first, then waiting ones as long as blocks, max_batch and the prefill limits
// allow. So a prompt is computed as early as possible and decoding never stops for it. A prompt
// longer than its share is computed over several steps; beside sequences that decode that share is
// what PrefillPace allows, unless all of them began after the prompt had come: a burst of prompts
// is computed at full speed.
//
// A prompt whose log-probabilities are wanted needs a row of logits per token, so its pieces are no
// longer than the rows that are left.
//
// With speculation a sequence that decodes takes guesses of its next tokens into the step, as far as
// tokens, rows and blocks are left, each with its row. Which of them are right the engine says
// (accept_draft()); a draft that is all right doubles the sequence's next, one that is all wrong halves
// it.
//
// A draft model keeps its own KV cache in the same blocks. While drafts pay (DraftPace) it follows
// prompts in the steps that compute them; where it is behind, it catches up by a few tokens per step
// before a sequence drafts. Which blocks its cache holds is known of each, those published included.
// Of a draft, what was accepted stays computed in both models; the last guess the draft model has yet
// to compute itself.
//
// A sequence begins with the blocks that are published for its first tokens, and publishes its own
// as they fill. The last token is always computed, for its logits.
//
// A waiting sequence enters when all blocks of its tokens are free; after that it takes one block
// at a time. When none is free, the youngest running sequence gives its blocks up and goes back to
// the head of the queue, before all that never ran, to be computed again from its first token; since its tokens stay and
// sampling depends on (seed, position) alone, its output does not change. The oldest always
// advances, because every accepted sequence fits the pool alone.
//
// One thread; no allocation in plan() once the vectors have grown.
class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions& options);

  // Joins the queue.
  void add(std::unique_ptr<Sequence> sequence);
  // Writes the next step's sequences. Returns false when there is nothing to compute.
  bool plan(StepPlanWriter& writer, DraftOrderWriter& order);
  // The logits that the plan asks for, in the order of its rows.
  [[nodiscard]] std::span<const PlannedRows> rows() const { return rows_; }
  // The planned step has been computed in `ns` (0: unknown).
  void advance(int64_t ns);
  // What the draft model guessed in the planned step, in the order in which the plan wants it.
  void take_guesses(std::span<const int32_t> guesses);
  // The guess at `place` of the draft of `sequence`, the first that was not accepted yet, is what was
  // sampled, and so is computed.
  void accept_draft(Sequence& sequence, int32_t place);
  // The KV cache is lost, cached prefixes too; an empty one of `blocks` takes its place. Every
  // sequence waits again, in order of admission, to be computed from its first token.
  void restart(int64_t blocks);
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
  [[nodiscard]] const DraftCounts& drafts() const { return drafts_; }
  // Prompt tokens that did not have to be computed.
  [[nodiscard]] uint64_t cached_tokens() const { return cached_tokens_; }

 private:
  [[nodiscard]] int64_t blocks_for(int64_t tokens) const;
  bool make_room();
  void preempt_youngest();
  [[nodiscard]] bool take_blocks(Sequence& sequence);
  void publish(Sequence& sequence);
  [[nodiscard]] int64_t share_of(const Sequence& prompt) const;
  [[nodiscard]] int32_t take_piece(Sequence& sequence, int64_t share);
  void age();
  void admit(int64_t prefills, int64_t budget);
  void draft();
  void follow(Sequence& sequence, int32_t index, DraftOrderWriter& order);
  void observe_step();
  void note_followed(Sequence& sequence, int32_t before);
  [[nodiscard]] bool allocate(int64_t count, Sequence& sequence);
  [[nodiscard]] bool has_draft_model() const { return options_.draft_model_tokens > 0; }
  void write(StepPlanWriter& writer, Sequence& sequence);

  SchedulerOptions options_;
  BlockPool pool_;
  // In the order in which they began: the last one gives way.
  std::vector<std::unique_ptr<Sequence>> running_;
  // Those that ran before, then by (priority, turn).
  std::deque<std::unique_ptr<Sequence>> waiting_;
  // The last turn given to each client that has waited lately, and the newest turn that began.
  std::unordered_map<std::string, uint64_t> turns_;
  uint64_t turn_ = 0;
  int64_t aged_ns_ = 0;  // when age() last looked
  std::vector<PlannedRows> rows_;
  PrefillPace pace_;
  // Of the step being planned.
  int64_t decodes_ = 0, prompt_tokens_ = 0, draft_tokens_ = 0, rows_left_ = 0;
  int64_t first_begun_ns_ = 0;  // when the oldest of those that decode got its first token
  std::vector<int32_t> drafted_;  // one sequence's newest token and its draft
  DraftPace draft_pace_;
  std::vector<bool> block_followed_;  // by block: the draft model's cache holds all of it
  bool follows_ = false;           // in the step being planned the draft model is of use
  int64_t follow_left_ = 0;        // tokens that it may still take,
  int64_t catch_up_left_ = 0;      // and of sequences that decode
  int64_t step_ns_ = 0;            // of the last step; 0: unknown
  uint64_t accepted_before_ = 0;   // drafts_.accepted before that step
  uint64_t preemptions_ = 0, cached_tokens_ = 0;
  DraftCounts drafts_;
};

}  // namespace phalanx::engine
