#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "phalanx/engine/adapter_order.h"
#include "phalanx/models/model.h"

namespace phalanx::engine {

// The one message of the step path: a flat, versioned, little-endian buffer. The head writes it,
// rank 0 forwards it verbatim, every rank decodes and checks it. Layout: docs/wire.md.
inline constexpr uint32_t kStepPlanMagic = 0x4c505850;  // "PXPL"
inline constexpr uint16_t kStepPlanVersion = 3;
// Of `flags`: the ranks gather when they did what, behind the step.
inline constexpr uint32_t kTraceStep = 1;

enum class StepKind : uint16_t {
  kCompute = 1,
  kIdle = 2,      // nothing to do; keeps links checked
  kStop = 3,      // leave the loop cleanly
  kAdapter = 4,   // an AdapterOrder
};

struct StepPlanHeader {
  uint32_t magic = kStepPlanMagic;
  uint16_t version = kStepPlanVersion;
  StepKind kind = StepKind::kCompute;
  uint64_t generation = 0;
  uint64_t step = 0;
  uint32_t bytes = 0;            // of the whole plan
  uint32_t num_tokens = 0;
  uint32_t num_sequences = 0;
  uint32_t num_rows = 0;         // logits wanted
  uint32_t num_blocks = 0;       // length of all block tables together
  uint32_t flags = 0;            // kTraceStep, with kCompute
};

// One sequence in the buffer.
struct PlannedSequence {
  int32_t token_begin = 0;
  int32_t token_count = 0;
  int32_t context = 0;
  int32_t block_begin = 0;       // into the block ids
  int32_t block_count = 0;
  uint32_t tag = 0;              // the request's number in order of admission; names logits files
  int32_t adapter = -1;          // slot of its LoRA adapter, -1: none
};
static_assert(sizeof(StepPlanHeader) == 48 && sizeof(PlannedSequence) == 28);

// Builds plans in one reused buffer (no allocation once grown).
class StepPlanWriter {
 public:
  void begin(StepKind kind, uint64_t generation, uint64_t step, uint32_t flags = 0);
  // tokens at positions [context - tokens.size(), context); sample: logits of the last one wanted.
  void add_sequence(std::span<const int32_t> tokens, int32_t context,
                    std::span<const int32_t> block_table, int32_t block_size, bool sample,
                    uint32_t tag = 0, int32_t adapter = -1);
  // As add_sequence, but the logits of every token are wanted.
  void add_scored_sequence(std::span<const int32_t> tokens, int32_t context,
                           std::span<const int32_t> block_table, int32_t block_size,
                           uint32_t tag = 0, int32_t adapter = -1);
  // With StepKind::kAdapter, instead of sequences. path: with kRead.
  void set_order(AdapterAct act, uint32_t slot, std::string_view path = {});
  // Valid until the next begin().
  [[nodiscard]] std::span<const std::byte> finish();

 private:
  void add(std::span<const int32_t> tokens, int32_t context, std::span<const int32_t> block_table,
           int32_t block_size, uint32_t tag, int32_t adapter);

  StepPlanHeader header_;
  std::vector<std::byte> order_;
  std::vector<int32_t> tokens_, positions_, slots_, rows_, blocks_;
  std::vector<PlannedSequence> sequences_;
  std::vector<std::byte> buffer_;
};

// What a rank must hold against a plan.
struct StepLimits {
  int64_t max_tokens = 0;
  int64_t max_rows = 0;
  int64_t max_sequence = 0;
  int64_t blocks = 0;
  int64_t block_size = 0;
  int64_t vocab_size = 0;
  int64_t ranks = 1;
  int64_t draft_sequences = 0;  // that a draft model guesses for in one step; 0: there is none
  int64_t max_adapters = 0;
  // Each has a block of its own, where its newest token goes.
  [[nodiscard]] int64_t max_sequences() const;
  // Ids in all block tables together; sequences may share blocks.
  [[nodiscard]] int64_t max_block_ids() const;
  [[nodiscard]] int64_t max_plan_bytes() const;
};

// Views into a plan buffer plus the slices made from it. Valid while the buffer is.
class StepPlanView {
 public:
  // Checks every length and index. Throws Error(kDataLoss) naming the field; the view is then
  // empty. `buffer` is the plan without anything behind it, 4-aligned.
  void decode(std::span<const std::byte> buffer, const StepLimits& limits);
  [[nodiscard]] const StepPlanHeader& header() const { return header_; }
  [[nodiscard]] const models::StepInputs& inputs() const { return inputs_; }
  [[nodiscard]] std::span<const PlannedSequence> sequences() const { return sequences_; }
  // With StepKind::kAdapter.
  [[nodiscard]] const AdapterOrder& order() const { return order_; }
  [[nodiscard]] std::string_view order_path() const { return order_path_; }

 private:
  void decode_order(std::span<const std::byte> body, const StepLimits& limits);
  void decode_body(std::span<const std::byte> buffer, const StepLimits& limits);

  StepPlanHeader header_;
  models::StepInputs inputs_;
  std::span<const PlannedSequence> sequences_;
  std::vector<ops::SequenceSlice> slices_;
  std::vector<int32_t> adapters_;
  AdapterOrder order_;
  std::string_view order_path_;
};

}  // namespace phalanx::engine
