#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "phalanx/base/clock.h"
#include "phalanx/engine/adapter_table.h"
#include "phalanx/engine/engine_options.h"
#include "phalanx/engine/request.h"
#include "phalanx/engine/step_channel.h"

namespace phalanx::engine {

// How the engine gets a step computed; the production one is ChannelExecutor, tests use their own.
class StepExecutor {
 public:
  virtual ~StepExecutor() = default;
  // Starts the step; returns at once. With a draft order (draft_order.h; else empty) the guesses that
  // it wants stand in the plan as zeros and are filled in first. Throws Error.
  virtual void send(std::span<const std::byte> plan, std::span<const std::byte> draft_order) = 0;
  // Logits f32 [rows, vocab], valid until the next send. Throws Error.
  virtual std::span<const float> wait(Deadline deadline, StepTiming* timing) = 0;
  // When the step that was waited for had kTraceStep: one per rank, valid until the next send.
  [[nodiscard]] virtual std::span<const RankTrace> traces() const = 0;
  // Of the step that was waited for, at least what its draft order wanted; valid until the next send.
  [[nodiscard]] virtual std::span<const int32_t> guesses() const = 0;
  // When the plan that was waited for had AdapterAct::kSettle: the same.
  [[nodiscard]] virtual std::span<const AdapterReport> adapter_reports() const = 0;
  // From any thread, more than once; wait() and send() throw Error soon.
  virtual void abort(const std::string& reason) noexcept = 0;
};

struct EngineStats {
  int64_t running = 0, waiting = 0;
  int64_t blocks_total = 0, blocks_free = 0;
  uint64_t received = 0, succeeded = 0, failed = 0, cancelled = 0;
  uint64_t prompt_tokens = 0, output_tokens = 0, steps = 0, preemptions = 0;
  uint64_t cached_tokens = 0;  // of the prompts, found computed in the prefix cache
  // Of speculation: drafts made, tokens in them, how many of these were right, and how many of the
  // drafts' first, second ... tokens.
  uint64_t drafts = 0, draft_tokens = 0, accepted_draft_tokens = 0;
  std::array<uint64_t, kMostDraftTokens> accepted_by_place{};
  int64_t draft_places = 0;  // tokens that a draft may have; 0: no speculation
  uint64_t draft_ns = 0;                                        // in the draft model; of compute_ns
  uint64_t step_ns = 0, compute_ns = 0, communication_ns = 0;  // sums over steps, as rank 0 saw them
  uint64_t overhead_ns = 0;                                     // planning and sampling in the head
};

// The head's engine: queue, scheduler (continuous batching, chunked prefill), KV blocks, sampler.
// One thread of its own. All methods from any thread. Every accepted request gets exactly one final
// event, whatever happens. A request whose prompt and output pass max_sequence or the whole KV
// cache ends there with kLength. Plans are numbered from 1; a kStop plan is the owner's to send,
// after the engine is gone.
class Engine {
 public:
  // Throws Error(kInvalidArgument) naming an option that cannot be.
  Engine(const EngineOptions& options, StepExecutor& executor);
  // Stops: running requests end with kCancelled. The step being computed has 2 s to end, then the
  // executor is aborted.
  ~Engine();

  // `detail` receives a sentence with the numbers when the request is not accepted.
  [[nodiscard]] SubmitResult submit(GenerateRequest request, std::shared_ptr<EventSink> sink,
                                    std::string* detail);
  // The sequence leaves the next plan and its blocks return; its sink gets kCancelled. Unknown ids
  // are ignored.
  void cancel(const std::string& id);
  // No new requests; returns true when none is left before the deadline.
  bool drain(Deadline deadline);
  // After the generation was lost (the executor threw, or is to be left): waits until the engine
  // thread has let go of the executor, which must have been aborted. Nothing is computed until
  // resume(); requests are still accepted and cancelled. What was computed of running requests is
  // forgotten, their accepted tokens are not. Throws Error(kDeadlineExceeded).
  void suspend(Deadline deadline);
  [[nodiscard]] bool suspended() const;
  // Goes on in a new generation with an empty KV cache of `blocks`: prompt and accepted tokens of
  // every request are computed again, then it continues where it was. A request that such a cache
  // cannot hold ends with kResourceExhausted. `executor` is used from now on; steps count from 1.
  void resume(StepExecutor& executor, uint64_t generation, int64_t blocks);
  // Ends every request with `error` after the step being computed and refuses new ones. The
  // executor is left in order, for the owner's kStop plan.
  void end_requests(const Error& error);
  // Ends every request with `error` (on the engine thread, soon), refuses new ones and aborts the
  // executor. Idempotent: the first error counts. Also called by the engine itself when the
  // executor throws.
  void fail(const Error& error);
  // The error given to fail(), if any.
  [[nodiscard]] std::optional<Error> failure() const;
  // Called from the engine thread when the executor threw: once, or with `recover` each time.
  void on_failure(std::function<void(const Error&)> callback);

  // Has every rank read the LoRA adapter at `path`, beside the steps that compute. done is called once,
  // from the engine thread (it must not block): with nothing when requests may name it, else with the
  // error. Throws Error at once: kFailedPrecondition (max_adapters is 0), kAlreadyExists,
  // kResourceExhausted (no slot), kInvalidArgument, kUnavailable.
  void load_adapter(const std::string& name, const std::string& path,
                    std::function<void(const std::optional<Error>&)> done);
  // New requests cannot name it from now on; those that use it go on to their end, and only then its
  // slot and memory are free. Throws Error(kNotFound), or kFailedPrecondition while it is being loaded.
  void unload_adapter(const std::string& name);
  // Those that requests may name, in the order in which they were loaded.
  [[nodiscard]] std::vector<AdapterTable::Named> adapters() const;

  // The next `steps` (1 to kMaxTracedSteps) that compute something are traced, on every rank. False:
  // that is going on already.
  [[nodiscard]] bool begin_trace(int64_t steps);
  // All that were asked for, or nothing while some are missing; with `now` those that there are. Then
  // another trace may begin.
  [[nodiscard]] std::optional<std::vector<StepTrace>> take_trace(bool now);

  [[nodiscard]] EngineStats stats() const;
  [[nodiscard]] const EngineOptions& options() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Sends plans through the shared memory of StepChannelHead.
class ChannelExecutor final : public StepExecutor {
 public:
  explicit ChannelExecutor(StepChannelHead& channel) : channel_(channel) {}
  void send(std::span<const std::byte> plan, std::span<const std::byte> draft_order) override {
    channel_.send(plan, draft_order);
  }
  std::span<const float> wait(Deadline deadline, StepTiming* timing) override {
    return channel_.wait_logits(deadline, timing);
  }
  [[nodiscard]] std::span<const RankTrace> traces() const override { return channel_.traces(); }
  [[nodiscard]] std::span<const int32_t> guesses() const override { return channel_.guesses(); }
  [[nodiscard]] std::span<const AdapterReport> adapter_reports() const override {
    return channel_.adapter_reports();
  }
  void abort(const std::string& reason) noexcept override { channel_.abort(reason); }

 private:
  StepChannelHead& channel_;
};

}  // namespace phalanx::engine
