#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "phalanx/base/check.h"
#include "phalanx/base/log.h"
#include "phalanx/engine/engine_state.h"

namespace phalanx::engine {

Engine::State::State(const EngineOptions& options, StepExecutor& executor)
    : options(options),
      executor(&executor),
      generation(options.generation),
      scheduler({.block_size = options.block_size,
                 .blocks = options.blocks,
                 .max_batch = options.max_batch,
                 .max_prefill_batch = options.max_prefill_batch,
                 .max_prefill_tokens = options.max_prefill_tokens,
                 .max_step_tokens = options.max_step_tokens,
                 .max_step_rows = std::max(options.max_step_rows, options.max_batch),
                 .share_prefixes = options.prefix_cache,
                 .decode_stretch = options.decode_stretch,
                 .ageing_ns = static_cast<int64_t>(options.ageing_seconds * 1e9),
                 .draft_batch = options.draft_tokens > 0 ? options.draft_batch : 0,
                 .lookup = {.most = options.draft_most, .least = options.draft_least},
                 .draft_model_tokens = options.draft_model ? options.max_step_tokens : 0}),
      sampler(options.vocab_size),
      adapters(options.max_adapters) {
  stats.blocks_total = stats.blocks_free = options.blocks;
}

void Engine::State::run() {
  try {
    for (;;) {
      std::optional<Error> lost;
      try {
        if (!loop()) break;
      } catch (const Error& error) {
        if (!options.recover) throw;
        lost = error;
      }
      if (!stay_suspended(lost)) break;
    }
  } catch (const Error& error) {
    fail_by_itself(error);
  } catch (const std::exception& error) {
    fail_by_itself(Error(Code::kInternal, fmt::format("the engine failed: {}", error.what())));
  }
  // Failed or stopping: nothing is computed any more, but everybody gets an answer.
  for (;;) {
    std::function<void(const Error&)> callback;
    std::unique_lock lock(mutex);
    const bool stop = stopping;
    const std::optional<Error> error = failure;
    if (report_failure && failure_callback) {
      report_failure = false;
      callback = failure_callback;
    }
    for (auto& s : inbox) scheduler.add(std::move(s));
    inbox.clear();
    lock.unlock();
    abandon_adapters(error.value_or(Error(Code::kUnavailable, "the engine is being stopped")));
    if (stop) {
      end_all(FinishReason::kCancelled, std::nullopt);
    } else {
      end_all(FinishReason::kError, error);
    }
    if (callback) callback(*error);
    if (stop) break;
    lock.lock();
    wake.wait_for(lock, std::chrono::seconds(1), [&] {
      return stopping || !inbox.empty() || (report_failure && failure_callback);
    });
  }
  const std::lock_guard lock(mutex);
  thread_done = true;
  settled.notify_all();
}

// False when stopping or failed by another, true when to be suspended; throws what the executor
// throws.
bool Engine::State::loop() {
  restore_adapters();
  while (take_work()) {
    bool adapters_first = false;
    {
      const std::lock_guard lock(mutex);
      const auto next = adapters_due();
      adapters_first = next && Clock::now() >= *next;
    }
    if (adapters_first) adapter_step();
    if (scheduler.empty()) {
      if (adapters_first) continue;
      idle_step();
    } else {
      compute_step();
    }
  }
  const std::lock_guard lock(mutex);
  return !stopping && !failure;
}

// Takes what came in; waits while there is nothing to do, until the next idle plan is due. False:
// stopping, failed or to be suspended.
bool Engine::State::take_work() {
  for (;;) {
    if (scheduler.empty()) deliver();  // else while the ranks compute
    const auto due = last_plan + std::chrono::duration_cast<Clock::duration>(
                                     std::chrono::duration<double>(options.idle_plan_seconds));
    bool any_cancels = false;
    {
      std::unique_lock lock(mutex);
      publish_stats();
      if (scheduler.empty()) {
        // What is said of adapters from another thread changes when to wake.
        while (!(stopping || failure || suspend_wanted || cancels || !inbox.empty())) {
          const auto adapter = adapters_due();
          const auto until = adapter ? std::min(due, *adapter) : due;
          if (Clock::now() >= until) break;
          wake.wait_until(lock, until);
        }
      }
      if (stopping || failure || suspend_wanted) return false;
      arrived.swap(inbox);
      any_cancels = std::exchange(cancels, false);
      stats.waiting += std::ssize(arrived);
    }
    for (auto& s : arrived) scheduler.add(std::move(s));
    arrived.clear();
    if (any_cancels) end_cancelled();
    if (!scheduler.empty() || Clock::now() >= due) return true;
    const std::lock_guard lock(mutex);
    const auto adapter = adapters_due();
    if (adapter && Clock::now() >= *adapter) return true;
  }
}

void Engine::State::end_cancelled() {
  scheduler.for_each([&](Sequence& s) {
    if (!s.cancel_requested.load(std::memory_order_relaxed)) return;
    GenerateEvent event = event_of(s);
    event.finish = FinishReason::kCancelled;
    finish(s, std::move(event));
  });
  retire();
}

void Engine::State::compute_step() {
  const int64_t begin = now_ns();
  bool traced = false;
  {
    const std::lock_guard lock(mutex);
    traced = std::ssize(traces) < trace_wanted;
  }
  writer.begin(StepKind::kCompute, generation, next_step, traced ? kTraceStep : 0);
  order.begin(generation, next_step);
  PHALANX_CHECK(scheduler.plan(writer, order));
  const std::span<const std::byte> plan = writer.finish();
  executor.load()->send(plan, order.finish());
  ++next_step;
  const int64_t sent = now_ns();
  {
    const std::lock_guard lock(mutex);
    publish_stats();
  }
  deliver();
  StepTiming timing;
  const std::span<const float> logits =
      executor.load()->wait(Deadline::in_seconds(options.step_seconds), &timing);
  const int64_t answered = now_ns();
  last_plan = Clock::now();
  scheduler.advance(timing.total_ns);
  scheduler.take_guesses(executor.load()->guesses());
  const auto vocab = static_cast<size_t>(options.vocab_size);
  size_t wanted = 0;
  for (const PlannedRows& rows : scheduler.rows()) wanted += static_cast<size_t>(rows.count);
  if (logits.size() != wanted * vocab) {
    throw Error(Code::kInternal,
                fmt::format("step {} returned {} logits, expected {} rows of {}", next_step - 1,
                            logits.size(), wanted, vocab));
  }
  bool any_finished = false;
  std::span<const float> rest = logits;
  for (const PlannedRows& rows : scheduler.rows()) {
    const size_t size = static_cast<size_t>(rows.count) * vocab;
    take_rows(rows, rest.first(size));
    rest = rest.subspan(size);
    any_finished |= rows.sequence->finished;
  }
  if (any_finished) retire();
  ++counted.steps;
  counted.step_ns += static_cast<uint64_t>(timing.total_ns);
  counted.compute_ns += static_cast<uint64_t>(timing.compute_ns);
  counted.communication_ns += static_cast<uint64_t>(timing.communication_ns);
  counted.draft_ns += static_cast<uint64_t>(timing.draft_ns);
  const int64_t end = now_ns();
  counted.overhead_ns += static_cast<uint64_t>(end - answered + sent - begin);
  if (!traced) return;
  StepPlanHeader header;
  std::memcpy(&header, plan.data(), sizeof(header));
  add_trace({.generation = generation,
             .step = next_step - 1,
             .begin_ns = begin,
             .sent_ns = sent,
             .answered_ns = answered,
             .end_ns = end,
             .draft_ns = timing.draft_ns,
             .sequences = header.num_sequences,
             .tokens = header.num_tokens,
             .rows = header.num_rows});
}

void Engine::State::add_trace(StepTrace trace) {
  for (const RankTrace& rank : executor.load()->traces()) {
    const auto count = std::min<size_t>(rank.count, rank.collectives.size());
    trace.ranks.push_back(
        {.length = rank.length,
         .dropped = rank.dropped,
         .collectives = {rank.collectives.begin(),
                         rank.collectives.begin() + static_cast<std::ptrdiff_t>(count)}});
  }
  const std::lock_guard lock(mutex);
  if (trace_wanted > 0) traces.push_back(std::move(trace));
}

void Engine::State::idle_step() {
  writer.begin(StepKind::kIdle, generation, next_step);
  executor.load()->send(writer.finish(), {});
  ++next_step;
  (void)executor.load()->wait(Deadline::in_seconds(options.step_seconds), nullptr);
  last_plan = Clock::now();
}

void Engine::State::take_rows(const PlannedRows& rows, std::span<const float> logits) {
  Sequence& s = *rows.sequence;
  const auto vocab = static_cast<size_t>(options.vocab_size);
  for (int32_t i = 0; i < rows.count && !s.finished; ++i) {
    const int32_t position = rows.position + i;
    const auto row = logits.subspan(static_cast<size_t>(i) * vocab, vocab);
    if (s.to_score() && position == s.scored) score(s, row);
    if (s.finished || position != s.length() - 1) continue;
    sample(s, row);
    // The next row counts if its guess is what was sampled.
    if (i + 1 < rows.count) {
      if (s.finished || s.tokens.back() != s.draft[static_cast<size_t>(i)]) break;
      scheduler.accept_draft(s, i);
    }
  }
  if (s.draft.empty()) return;
  const auto most = static_cast<int32_t>(options.draft_tokens);
  const int32_t right = s.length() - rows.position - 2;  // sampled, but the last, were guessed
  if (right == 0) s.draft_limit = std::max(1, s.draft_limit / 2);
  if (right == static_cast<int32_t>(s.draft.size())) s.draft_limit = std::min(most, 2 * s.draft_limit);
}

// The log-probability of the prompt's next token that has none yet.
void Engine::State::score(Sequence& s, std::span<const float> row) {
  PromptLogprob result;
  const int32_t token = s.tokens[static_cast<size_t>(s.scored) + 1];
  if (!sampler.score(row, token, s.params.prompt_logprobs, &result))
    return finish_not_finite(s, s.scored + 1);
  s.prompt_scores.push_back(std::move(result));
  ++s.scored;
}

void Engine::State::finish_not_finite(Sequence& s, int32_t position) {
  GenerateEvent event = event_of(s);
  event.finish = FinishReason::kError;
  event.error = Error(
      Code::kInternal,
      fmt::format("the model's logits for the token at position {} are not finite numbers; only "
                  "this request is affected",
                  position));
  finish(s, std::move(event));
}

void Engine::State::sample(Sequence& s, std::span<const float> row) {
  const SampleResult result =
      sampler.sample(row,
                     {.params = &s.params,
                      .seed = s.seed,
                      .position = static_cast<uint32_t>(s.length()),
                      .outputs = s.outputs(),
                      .counts = s.counts ? &*s.counts : nullptr},
                     &top);
  if (!result.valid) {
    if (result.error.empty()) return finish_not_finite(s, s.length());
    GenerateEvent event = event_of(s);
    event.finish = FinishReason::kError;
    event.error = Error(Code::kInternal, result.error);
    finish(s, std::move(event));
    return;
  }
  s.tokens.push_back(result.token);
  if (s.first_token_ns == 0) s.first_token_ns = now_ns();
  if (s.counts) s.counts->add_output(result.token);
  if (s.params.guide) s.params.guide->accept(result.token);
  if (s.outputs() == 1) counted.prompt_tokens += static_cast<uint64_t>(s.prompt_count);
  ++counted.output_tokens;
  GenerateEvent event = event_of(s);
  event.token = result.token;
  event.prompt = std::exchange(s.prompt_scores, {});
  if (s.params.logprobs >= 0) {
    event.logprob = result.logprob;
    event.top = top;
  }
  const auto& stops = s.params.stop_token_ids;
  if (std::find(stops.begin(), stops.end(), result.token) != stops.end()) {
    event.finish = FinishReason::kStop;
    event.stop_token = result.token;
  } else if (s.outputs() >= s.max_outputs) {
    event.finish = FinishReason::kLength;
  }
  if (event.finish != FinishReason::kNone) {
    finish(s, std::move(event));
  } else {
    outgoing.push_back({s.sink, std::move(event)});
  }
}

GenerateEvent Engine::State::event_of(const Sequence& s) const {
  GenerateEvent event;
  event.prompt_tokens = s.prompt_count;
  event.output_tokens = s.outputs();
  event.cached_tokens = s.cached_tokens;
  event.queue_ns = s.queue_ns;
  return event;
}

// The sequence's last event. It leaves the scheduler at the next retire().
void Engine::State::finish(Sequence& s, GenerateEvent event) {
  PHALANX_CHECK(!s.finished);
  s.finished = true;
  switch (event.finish) {
    case FinishReason::kCancelled: ++counted.cancelled; break;
    case FinishReason::kError: ++counted.failed; break;
    default: ++counted.succeeded; break;
  }
  outgoing.push_back({std::move(s.sink), std::move(event)});
}

// Finished sequences give back their blocks and their ids.
void Engine::State::retire() {
  const size_t before = retired.size();
  scheduler.collect(retired);
  const std::lock_guard lock(mutex);
  for (size_t i = before; i < retired.size(); ++i) {
    active.erase(retired[i]->id);
    if (retired[i]->salt != 0) adapters.release(retired[i]->salt);
  }
}

void Engine::State::deliver() {
  if (outgoing.empty()) return;
  int64_t finals = 0;
  for (Outgoing& o : outgoing) {
    finals += o.event.finish != FinishReason::kNone ? 1 : 0;
    try {
      o.sink->on_event(std::move(o.event));
    } catch (const std::exception& error) {
      log_error("a receiver of tokens threw, which it must not: {}", error.what());
    }
    o.sink.reset();
  }
  outgoing.clear();
  retired.clear();
  if (finals == 0) return;
  const std::lock_guard lock(mutex);
  undelivered -= finals;
  settled.notify_all();
}

void Engine::State::end_all(FinishReason reason, const std::optional<Error>& error) {
  scheduler.for_each([&](Sequence& s) {
    if (s.finished) return;  // in the step that failed
    GenerateEvent event = event_of(s);
    event.finish = reason;
    event.error = error;
    finish(s, std::move(event));
  });
  retire();
  deliver();
  const std::lock_guard lock(mutex);
  publish_stats();
}

// With `mutex` held.
void Engine::State::publish_stats() {
  counted.received = stats.received;
  counted.running = scheduler.running();
  counted.waiting = scheduler.waiting();
  counted.blocks_total = scheduler.pool().total();
  counted.blocks_free = scheduler.pool().free();
  counted.preemptions = scheduler.preemptions();
  counted.cached_tokens = scheduler.cached_tokens();
  const DraftCounts& drafts = scheduler.drafts();
  counted.drafts = drafts.drafts;
  counted.draft_tokens = drafts.tokens;
  counted.accepted_draft_tokens = drafts.accepted;
  counted.accepted_by_place = drafts.accepted_by_place;
  counted.draft_places = options.draft_tokens;
  stats = counted;
}

void Engine::State::fail_by_itself(const Error& error) {
  {
    const std::lock_guard lock(mutex);
    if (!failure && !stopping) {
      failure = error;
      report_failure = true;
    }
  }
  executor.load()->abort(error.what());
}

}  // namespace phalanx::engine
