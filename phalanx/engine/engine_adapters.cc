// LoRA adapters: plans between those that compute tell the ranks to read, use and forget them.

#include <fmt/format.h>

#include <utility>

#include "phalanx/base/log.h"
#include "phalanx/engine/engine_state.h"

namespace phalanx::engine {

namespace {

constexpr auto kSettleEvery = std::chrono::milliseconds(10);

}  // namespace

// With `mutex` held. When the ranks are to be told something about adapters; never: nothing.
std::optional<Clock::time_point> Engine::State::adapters_due() const {
  const auto order = adapters.next();
  if (!order) return std::nullopt;
  return order->act == AdapterAct::kSettle ? last_settle + kSettleEvery : Clock::time_point{};
}

// One plan for the adapters.
void Engine::State::adapter_step() {
  std::optional<AdapterTable::Order> order;
  {
    const std::lock_guard lock(mutex);
    order = adapters.next();
  }
  if (!order) return;
  writer.begin(StepKind::kAdapter, generation, next_step);
  writer.set_order(order->act, order->slot, order->path);
  executor.load()->send(writer.finish(), {});
  ++next_step;
  (void)executor.load()->wait(Deadline::in_seconds(options.step_seconds), nullptr);
  last_plan = last_settle = Clock::now();
  AdapterVerdict verdict;
  if (order->act == AdapterAct::kSettle)
    verdict = judge(executor.load()->adapter_reports(), options.rank_places);
  AdapterTable::Outcome outcome;
  {
    const std::lock_guard lock(mutex);
    outcome = adapters.told(*order, verdict);
  }
  if (outcome.lost != 0) end_adapter(outcome);
  if (outcome.done) outcome.done(outcome.error);
}

// Requests with an adapter that a new generation could not read again.
void Engine::State::end_adapter(const AdapterTable::Outcome& outcome) {
  const std::string text =
      fmt::format("after a recovery the LoRA adapter '{}' could not be read again: {}",
                  outcome.name, outcome.error->what());
  log_error("{}; it is unloaded", text);
  scheduler.for_each([&](Sequence& s) {
    if (s.salt != outcome.lost || s.finished) return;
    GenerateEvent event = event_of(s);
    event.finish = FinishReason::kError;
    event.error = Error(Code::kUnavailable, text);
    finish(s, std::move(event));
  });
  retire();
}

// After a recovery: before anything is computed the ranks have what they had.
void Engine::State::restore_adapters() {
  for (;;) {
    {
      std::unique_lock lock(mutex);
      if (!adapters.restoring() || stopping || failure || suspend_wanted) return;
      const auto due = adapters_due();
      if (due) wake.wait_until(lock, *due, [&] { return stopping || failure || suspend_wanted; });
      if (stopping || failure || suspend_wanted) return;
    }
    adapter_step();
  }
}

void Engine::State::abandon_adapters(const Error& error) {
  std::vector<AdapterTable::Done> waiting;
  {
    const std::lock_guard lock(mutex);
    waiting = adapters.abandon();
  }
  for (const AdapterTable::Done& done : waiting) done(error);
}

void Engine::load_adapter(const std::string& name, const std::string& path,
                          std::function<void(const std::optional<Error>&)> done) {
  if (path.empty() || path.size() > kMostAdapterPath)
    throw Error(Code::kInvalidArgument,
                fmt::format("the path of the LoRA adapter '{}' has {} bytes, expected 1 to {}",
                            name, path.size(), kMostAdapterPath));
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  if (s.failure || s.stopping || s.draining)
    throw Error(Code::kUnavailable,
                s.failure ? fmt::format("the engine has failed: {}", s.failure->what())
                          : "the engine is being stopped");
  s.adapters.add(name, path, std::move(done));
  s.wake.notify_all();
}

void Engine::unload_adapter(const std::string& name) {
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  s.adapters.remove(name);
  s.wake.notify_all();
}

std::vector<AdapterTable::Named> Engine::adapters() const {
  const std::lock_guard lock(state_->mutex);
  return state_->adapters.usable();
}

}  // namespace phalanx::engine
