#pragma once

// Inside of Engine, shared by what runs on its thread (engine_thread.cc) and what any thread may
// call (engine.cc).

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "phalanx/engine/adapter_table.h"
#include "phalanx/engine/engine.h"
#include "phalanx/engine/sampler.h"
#include "phalanx/engine/scheduler.h"
#include "phalanx/engine/sequence.h"

namespace phalanx::engine {

struct Engine::State {
  State(const EngineOptions& options, StepExecutor& executor);

  void run();
  bool loop();
  void end_cancelled();
  bool stay_suspended(const std::optional<Error>& error);  // engine_recovery.cc
  void replay(int64_t blocks);
  bool take_work();
  void finish(Sequence& sequence, GenerateEvent event);
  void end_all(FinishReason reason, const std::optional<Error>& error);
  void retire();
  void deliver();
  void take_rows(const PlannedRows& rows, std::span<const float> logits);
  void score(Sequence& sequence, std::span<const float> row);
  void sample(Sequence& sequence, std::span<const float> row);
  void finish_not_finite(Sequence& sequence, int32_t position);
  void compute_step();
  void idle_step();
  [[nodiscard]] std::optional<Clock::time_point> adapters_due() const;  // engine_adapters.cc
  void adapter_step();
  void end_adapter(const AdapterTable::Outcome& outcome);
  void restore_adapters();
  void abandon_adapters(const Error& error);
  void publish_stats();
  void add_trace(StepTrace trace);
  void fail_by_itself(const Error& error);
  GenerateEvent event_of(const Sequence& sequence) const;

  struct Outgoing {
    std::shared_ptr<EventSink> sink;
    GenerateEvent event;
  };

  const EngineOptions options;
  std::atomic<StepExecutor*> executor;  // changed while suspended only

  // --- Engine thread only.
  uint64_t generation;
  Scheduler scheduler;
  Sampler sampler;
  StepPlanWriter writer;
  DraftOrderWriter order;
  uint64_t next_step = 1;
  std::vector<std::unique_ptr<Sequence>> arrived;  // taken from the inbox
  std::vector<std::unique_ptr<Sequence>> retired;  // out of the scheduler, not yet destroyed
  std::vector<Outgoing> outgoing;
  std::vector<TokenLogprob> top;
  Clock::time_point last_plan = Clock::now();
  Clock::time_point last_settle;                   // when the ranks were last told of adapters
  EngineStats counted;                             // what this thread counts

  // --- Guarded by `mutex`.
  mutable std::mutex mutex;
  std::condition_variable wake;    // the engine thread waits for work
  std::condition_variable settled; // drain() and the destructor wait
  std::vector<std::unique_ptr<Sequence>> inbox;
  std::unordered_map<std::string, Sequence*> active;  // by id, until the final event is made
  AdapterTable adapters;
  EngineStats stats;
  uint32_t next_tag = 0;
  int64_t undelivered = 0;         // accepted, final event not yet delivered
  bool cancels = false;            // some cancel_requested is new
  bool stopping = false, draining = false, thread_done = false;
  std::optional<Error> failure;
  bool report_failure = false;     // the engine failed by itself and on_failure was not called yet
  struct Resumption {
    uint64_t generation = 0;
    int64_t blocks = 0;
  };
  bool suspend_wanted = false, suspended = false;
  std::optional<Resumption> resumption;
  std::function<void(const Error&)> failure_callback;
  int64_t trace_wanted = 0;        // steps of the trace being made; 0: none is
  std::vector<StepTrace> traces;   // of it, so far

  std::thread thread;
};

}  // namespace phalanx::engine
