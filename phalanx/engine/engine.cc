#include "phalanx/engine/engine.h"

#include <fmt/format.h>

#include <utility>

#include "phalanx/base/check.h"
#include "phalanx/engine/engine_state.h"
#include "phalanx/engine/submission.h"

namespace phalanx::engine {

namespace {

constexpr double kStopSeconds = 2;  // for the step being computed when the engine is destroyed

}  // namespace

Engine::Engine(const EngineOptions& options, StepExecutor& executor) {
  check_options(options);
  state_ = std::make_unique<State>(options, executor);
  state_->thread = std::thread([state = state_.get()] { state->run(); });
}

Engine::~Engine() {
  State& s = *state_;
  bool done = false;
  {
    std::unique_lock lock(s.mutex);
    s.stopping = true;
    s.wake.notify_all();
    done = s.settled.wait_for(lock, std::chrono::duration<double>(kStopSeconds),
                              [&] { return s.thread_done; });
  }
  if (!done) s.executor.load()->abort("the engine stopped while a step was being computed");
  s.thread.join();
}

SubmitResult Engine::submit(GenerateRequest request, std::shared_ptr<EventSink> sink,
                            std::string* detail) {
  State& s = *state_;
  const auto refuse = [&](SubmitResult result, std::string text) {
    if (detail != nullptr) *detail = std::move(text);
    return result;
  };
  const std::string adapter = request.adapter;
  Submission submission = make_sequence(std::move(request), std::move(sink), s.options);
  if (submission.result != SubmitResult::kAccepted) {
    return refuse(submission.result, std::move(submission.detail));
  }
  std::unique_ptr<Sequence>& sequence = submission.sequence;

  const std::lock_guard lock(s.mutex);
  if (s.failure) {
    return refuse(SubmitResult::kStopped,
                  fmt::format("the engine has failed: {}", s.failure->what()));
  }
  if (s.stopping || s.draining) {
    return refuse(SubmitResult::kStopped,
                  "the engine is being stopped and takes no new requests");
  }
  if (s.active.contains(sequence->id)) {
    return refuse(SubmitResult::kDuplicateId,
                  fmt::format("a request with the id '{}' is still running", sequence->id));
  }
  const int64_t waiting = s.stats.waiting + std::ssize(s.inbox);
  if (waiting >= s.options.max_queue) {
    return refuse(SubmitResult::kQueueFull,
                  fmt::format("{} requests are waiting, at most {} may", waiting,
                              s.options.max_queue));
  }
  if (!adapter.empty()) {
    const auto found = s.adapters.find(adapter);
    if (!found)
      return refuse(SubmitResult::kUnknownAdapter,
                    fmt::format("the LoRA adapter '{}' is not loaded", adapter));
    s.adapters.acquire(found->id);
    sequence->salt = found->id;
    sequence->adapter = found->slot;
  }
  sequence->tag = s.next_tag++;
  s.active.emplace(sequence->id, sequence.get());
  s.inbox.push_back(std::move(sequence));
  ++s.stats.received;
  ++s.undelivered;
  s.wake.notify_all();
  return SubmitResult::kAccepted;
}

void Engine::cancel(const std::string& id) {
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  const auto found = s.active.find(id);
  if (found == s.active.end()) return;
  found->second->cancel_requested.store(true, std::memory_order_relaxed);
  s.cancels = true;
  s.wake.notify_all();
}

bool Engine::drain(Deadline deadline) {
  State& s = *state_;
  std::unique_lock lock(s.mutex);
  s.draining = true;
  return s.settled.wait_until(lock, deadline.when(), [&] { return s.undelivered == 0; });
}

void Engine::end_requests(const Error& error) {
  const std::lock_guard lock(state_->mutex);
  if (!state_->failure) state_->failure = error;
  state_->wake.notify_all();
}

void Engine::fail(const Error& error) {
  end_requests(error);
  state_->executor.load()->abort(failure()->what());
}

std::optional<Error> Engine::failure() const {
  const std::lock_guard lock(state_->mutex);
  return state_->failure;
}

void Engine::on_failure(std::function<void(const Error&)> callback) {
  const std::lock_guard lock(state_->mutex);
  state_->failure_callback = std::move(callback);
  state_->wake.notify_all();
}

bool Engine::begin_trace(int64_t steps) {
  PHALANX_CHECK(steps > 0 && steps <= kMaxTracedSteps);
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  if (s.trace_wanted > 0) return false;
  s.trace_wanted = steps;
  s.traces.clear();
  return true;
}

std::optional<std::vector<StepTrace>> Engine::take_trace(bool now) {
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  if (s.trace_wanted == 0 || (!now && std::ssize(s.traces) < s.trace_wanted)) return std::nullopt;
  s.trace_wanted = 0;
  return std::exchange(s.traces, {});
}

EngineStats Engine::stats() const {
  const std::lock_guard lock(state_->mutex);
  EngineStats stats = state_->stats;
  stats.waiting += std::ssize(state_->inbox);
  return stats;
}

const EngineOptions& Engine::options() const { return state_->options; }

}  // namespace phalanx::engine
