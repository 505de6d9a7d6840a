#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "phalanx/base/clock.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/engine/step_plan.h"
#include "phalanx/engine/step_trace.h"

namespace phalanx::engine {

// Shared memory between the head and rank 0: one plan area, one logits area, one of traces, with a
// draft model (StepLimits::draft_sequences) one of orders to it and one of its guesses, and two
// sequence words that each side waits on (spin ~50 us, then futex in slices of at most 50 ms). At
// most one step is outstanding. A result carries (generation, step); anything but the outstanding
// pair is dropped. Every kind of plan is answered, kStop too. Layout: step_channel.cc.

// Bytes of the memfd for these limits.
[[nodiscard]] int64_t step_channel_bytes(const StepLimits& limits);
// A sealed, CLOEXEC memfd, to be handed to rank 0 by descriptor.
[[nodiscard]] UniqueFd create_step_channel(const StepLimits& limits);

struct StepTiming {
  int64_t total_ns = 0;           // in rank 0, plan received to logits written
  int64_t compute_ns = 0;
  int64_t communication_ns = 0;
  int64_t draft_ns = 0;           // of compute_ns, in the draft model
};

// Head side. Used from the engine thread; abort() from any.
class StepChannelHead {
 public:
  StepChannelHead(int memfd, const StepLimits& limits);
  ~StepChannelHead();
  // Throws Error(kAborted) after abort(), Error(kUnavailable) after a failure of rank 0,
  // Error(kFailedPrecondition) while a step is outstanding, Error(kInvalidArgument) for a plan
  // larger than the plan area or without a header, or an order (draft_order.h) larger than its own.
  void send(std::span<const std::byte> plan, std::span<const std::byte> draft_order = {});
  // Waits for the outstanding step. Throws Error(kDeadlineExceeded) (the step stays outstanding and
  // may be waited for again), Error(kAborted) after abort(), Error(kUnavailable) with the rank's own
  // message when rank 0 reported a failure. Returns [num_rows * vocab_size] of that plan.
  // The span is valid until the next send.
  std::span<const float> wait_logits(Deadline deadline, StepTiming* timing);
  // Of a step with kTraceStep that was waited for, one per rank. Valid until the next send. Written by
  // another process: counts may be anything.
  [[nodiscard]] std::span<const RankTrace> traces() const;
  // The draft model's guesses in the step that was waited for, in the order of its wants; what is
  // behind them is left over. Valid until the next send. Written by another process: ids may be
  // anything.
  [[nodiscard]] std::span<const int32_t> guesses() const;
  // Of a plan with AdapterAct::kSettle that was waited for, one per rank, as traces().
  [[nodiscard]] std::span<const AdapterReport> adapter_reports() const;
  void abort(const std::string& reason) noexcept;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Rank 0 side. Used from the worker thread; abort() from any.
class StepChannelRank {
 public:
  StepChannelRank(int memfd, const StepLimits& limits);
  ~StepChannelRank();
  // Next plan, or empty when the deadline passed. Throws Error(kAborted) after abort().
  // The span is valid until publish().
  std::span<const std::byte> wait_plan(Deadline deadline);
  // What the draft model is to compute before that plan; empty: nothing. Valid as the plan.
  [[nodiscard]] std::span<const std::byte> draft_order() const;
  [[nodiscard]] std::span<int32_t> guesses();  // [max_rows]; empty without a draft model
  [[nodiscard]] float* logits();  // [max_rows, vocab_size], 64-aligned
  [[nodiscard]] std::span<RankTrace> traces();  // one per rank; before publish()
  [[nodiscard]] std::span<AdapterReport> adapter_reports();  // the same
  void publish(uint64_t generation, uint64_t step, const StepTiming& timing);
  // Tells the head; the first message counts.
  void fail(const std::string& message) noexcept;
  void abort(const std::string& reason) noexcept;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace phalanx::engine
