// The engine between two generations: nothing is computed, requests wait, and afterwards prompt and
// accepted tokens of every sequence are computed again.

#include <fmt/format.h>

#include <utility>

#include "phalanx/base/check.h"
#include "phalanx/engine/engine_state.h"

namespace phalanx::engine {

// Engine thread. Until resumed (true), or stopping or failed (false). The step in flight is
// discarded whole: none of its tokens was accepted.
bool Engine::State::stay_suspended(const std::optional<Error>& error) {
  retire();
  scheduler.restart(scheduler.pool().total());
  deliver();
  std::unique_lock lock(mutex);
  publish_stats();
  suspended = true;
  settled.notify_all();
  if (error && !suspend_wanted && failure_callback) {
    const auto callback = failure_callback;
    lock.unlock();
    callback(*error);
    lock.lock();
  }
  for (;;) {
    wake.wait(lock, [&] { return stopping || failure || resumption || cancels || !inbox.empty(); });
    if (stopping || failure) return false;
    arrived.swap(inbox);
    const bool any_cancels = std::exchange(cancels, false);
    stats.waiting += std::ssize(arrived);
    const std::optional<Resumption> next = std::exchange(resumption, std::nullopt);
    if (next) {
      suspended = suspend_wanted = false;
      adapters.restart();
    }
    lock.unlock();
    for (auto& s : arrived) scheduler.add(std::move(s));
    arrived.clear();
    if (any_cancels) end_cancelled();
    if (next) {
      generation = next->generation;
      next_step = 1;
      replay(next->blocks);
    }
    deliver();
    if (next) return true;
    lock.lock();
    publish_stats();
  }
}

void Engine::State::replay(int64_t blocks) {
  scheduler.restart(blocks);
  const int64_t slots = blocks * options.block_size;
  scheduler.for_each([&](Sequence& s) {
    if (int64_t{s.prompt_count} + s.max_outputs - 1 <= slots) return;
    GenerateEvent event = event_of(s);
    event.finish = FinishReason::kError;
    event.error = Error(Code::kResourceExhausted,
                        fmt::format("after a recovery the KV cache holds {} tokens, this request "
                                    "may need {}",
                                    slots, s.prompt_count + s.max_outputs - 1));
    finish(s, std::move(event));
  });
  retire();
}

void Engine::suspend(Deadline deadline) {
  State& s = *state_;
  std::unique_lock lock(s.mutex);
  s.suspend_wanted = true;
  s.wake.notify_all();
  if (!s.settled.wait_until(lock, deadline.when(),
                            [&] { return s.suspended || s.failure || s.thread_done; }))
    throw Error(Code::kDeadlineExceeded, "the engine did not leave the lost generation in time");
}

bool Engine::suspended() const {
  const std::lock_guard lock(state_->mutex);
  return state_->suspended;
}

void Engine::resume(StepExecutor& executor, uint64_t generation, int64_t blocks) {
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  PHALANX_CHECK(s.suspended || s.failure || s.thread_done);
  s.executor = &executor;
  s.resumption = State::Resumption{.generation = generation, .blocks = blocks};
  s.wake.notify_all();
}

}  // namespace phalanx::engine
