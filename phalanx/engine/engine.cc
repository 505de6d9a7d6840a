#include "phalanx/engine/engine.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "phalanx/base/check.h"
#include "phalanx/base/log.h"
#include "phalanx/engine/sampler.h"
#include "phalanx/engine/scheduler.h"
#include "phalanx/engine/sequence.h"

namespace phalanx::engine {

namespace {

constexpr double kStopSeconds = 2;  // for the step being computed when the engine is destroyed

void check_options(const EngineOptions& o) {
  Problems problems;
  const auto at_least = [&](const char* name, int64_t value, int64_t least) {
    if (value >= least) return;
    problems.add({.what = fmt::format("{} is out of range", name),
                  .where = "engine options",
                  .found = fmt::format("{}", value),
                  .expected = fmt::format("at least {}", least)});
  };
  at_least("vocab_size", o.vocab_size, 1);
  at_least("block_size", o.block_size, 1);
  at_least("blocks", o.blocks, 1);
  at_least("max_sequence", o.max_sequence, 2);
  at_least("max_input_tokens", o.max_input_tokens, 1);
  at_least("max_prefill_tokens", o.max_prefill_tokens, 1);
  at_least("max_prefill_batch", o.max_prefill_batch, 1);
  at_least("max_batch", o.max_batch, 1);
  at_least("max_output_tokens", o.max_output_tokens, 1);
  at_least("max_step_tokens", o.max_step_tokens, std::max<int64_t>(1, o.max_batch));
  at_least("max_queue", o.max_queue, 1);
  if (o.blocks > 0 && o.block_size > 0 && o.blocks > INT32_MAX / o.block_size) {
    problems.add({.what = "the KV cache has more slots than a 32-bit slot number can name",
                  .where = "engine options",
                  .found = fmt::format("{} blocks of {}", o.blocks, o.block_size),
                  .expected = fmt::format("at most {} slots", INT32_MAX)});
  }
  problems.throw_if_any("the engine cannot start");
}

// What is wrong with the values, or nothing.
std::optional<std::string> check_sampling(const SamplingParams& p) {
  const auto wrong = [](const char* name, auto found, const char* expected) {
    return fmt::format("{} is {}, expected {}", name, found, expected);
  };
  if (!(p.temperature >= 0 && std::isfinite(p.temperature)))
    return wrong("temperature", p.temperature, "a number of 0 or more");
  if (p.top_k < -1) return wrong("top_k", p.top_k, "-1 or 0 (off) or more");
  if (!(p.top_p > 0 && p.top_p <= 1)) return wrong("top_p", p.top_p, "more than 0, at most 1");
  if (!(p.min_p >= 0 && p.min_p <= 1)) return wrong("min_p", p.min_p, "0 to 1");
  if (!(p.repetition_penalty > 0 && std::isfinite(p.repetition_penalty)))
    return wrong("repetition_penalty", p.repetition_penalty, "a number above 0");
  if (!std::isfinite(p.presence_penalty))
    return wrong("presence_penalty", p.presence_penalty, "a finite number");
  if (!std::isfinite(p.frequency_penalty))
    return wrong("frequency_penalty", p.frequency_penalty, "a finite number");
  if (p.max_tokens < 1) return wrong("max_tokens", p.max_tokens, "1 or more");
  if (p.min_tokens < 0) return wrong("min_tokens", p.min_tokens, "0 or more");
  return std::nullopt;
}

bool has_penalty(const SamplingParams& p) {
  return p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
}

}  // namespace

struct Engine::State {
  State(const EngineOptions& options, StepExecutor& executor);

  void run();
  void loop();
  bool take_work();
  void finish(Sequence& sequence, GenerateEvent event);
  void end_all(FinishReason reason, const std::optional<Error>& error);
  void retire();
  void deliver();
  void sample(Sequence& sequence, std::span<const float> row);
  void compute_step();
  void idle_step();
  void publish_stats();
  void fail_by_itself(const Error& error);
  GenerateEvent event_of(const Sequence& sequence) const;

  struct Outgoing {
    std::shared_ptr<EventSink> sink;
    GenerateEvent event;
  };

  const EngineOptions options;
  StepExecutor& executor;

  // --- Engine thread only.
  Scheduler scheduler;
  Sampler sampler;
  StepPlanWriter writer;
  uint64_t next_step = 1;
  std::vector<std::unique_ptr<Sequence>> arrived;  // taken from the inbox
  std::vector<std::unique_ptr<Sequence>> retired;  // out of the scheduler, not yet destroyed
  std::vector<Outgoing> outgoing;
  std::vector<TokenLogprob> top;
  Clock::time_point last_plan = Clock::now();
  EngineStats counted;                             // what this thread counts

  // --- Guarded by `mutex`.
  mutable std::mutex mutex;
  std::condition_variable wake;    // the engine thread waits for work
  std::condition_variable settled; // drain() and the destructor wait
  std::vector<std::unique_ptr<Sequence>> inbox;
  std::unordered_map<std::string, Sequence*> active;  // by id, until the final event is made
  EngineStats stats;
  uint32_t next_tag = 0;
  int64_t undelivered = 0;         // accepted, final event not yet delivered
  bool cancels = false;            // some cancel_requested is new
  bool stopping = false, draining = false, thread_done = false;
  std::optional<Error> failure;
  bool report_failure = false;     // the engine failed by itself and on_failure was not called yet
  std::function<void(const Error&)> failure_callback;

  std::thread thread;
};

Engine::State::State(const EngineOptions& options, StepExecutor& executor)
    : options(options),
      executor(executor),
      scheduler({.block_size = options.block_size,
                 .blocks = options.blocks,
                 .max_batch = options.max_batch,
                 .max_prefill_batch = options.max_prefill_batch,
                 .max_prefill_tokens = options.max_prefill_tokens,
                 .max_step_tokens = options.max_step_tokens}),
      sampler(options.vocab_size) {
  stats.blocks_total = stats.blocks_free = options.blocks;
}

// --- Engine thread ---------------------------------------------------------------------------

void Engine::State::run() {
  try {
    loop();
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

// Returns when stopping or failed by another; throws what the executor throws.
void Engine::State::loop() {
  while (take_work()) {
    if (scheduler.empty()) {
      idle_step();
    } else {
      compute_step();
    }
  }
}

// Takes what came in; waits while there is nothing to do, until the next idle plan is due. False:
// stopping or failed.
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
        wake.wait_until(lock, due,
                        [&] { return stopping || failure || cancels || !inbox.empty(); });
      }
      if (stopping || failure) return false;
      arrived.swap(inbox);
      any_cancels = std::exchange(cancels, false);
      stats.waiting += std::ssize(arrived);
    }
    for (auto& s : arrived) scheduler.add(std::move(s));
    arrived.clear();
    if (any_cancels) {
      scheduler.for_each([&](Sequence& s) {
        if (!s.cancel_requested.load(std::memory_order_relaxed)) return;
        GenerateEvent event = event_of(s);
        event.finish = FinishReason::kCancelled;
        finish(s, std::move(event));
      });
      retire();
    }
    if (!scheduler.empty() || Clock::now() >= due) return true;
  }
}

void Engine::State::compute_step() {
  const int64_t begin = now_ns();
  writer.begin(StepKind::kCompute, options.generation, next_step);
  PHALANX_CHECK(scheduler.plan(writer));
  executor.send(writer.finish());
  ++next_step;
  const int64_t sent = now_ns();
  {
    const std::lock_guard lock(mutex);
    publish_stats();
  }
  deliver();
  StepTiming timing;
  const std::span<const float> logits =
      executor.wait(Deadline::in_seconds(options.step_seconds), &timing);
  const int64_t answered = now_ns();
  last_plan = Clock::now();
  scheduler.advance();
  const auto sampled = scheduler.sampled();
  const auto vocab = static_cast<size_t>(options.vocab_size);
  if (logits.size() != sampled.size() * vocab) {
    throw Error(Code::kInternal,
                fmt::format("step {} returned {} logits, expected {} rows of {}", next_step - 1,
                            logits.size(), sampled.size(), vocab));
  }
  bool any_finished = false;
  for (size_t row = 0; row < sampled.size(); ++row) {
    sample(*sampled[row], logits.subspan(row * vocab, vocab));
    any_finished |= sampled[row]->finished;
  }
  if (any_finished) retire();
  ++counted.steps;
  counted.step_ns += static_cast<uint64_t>(timing.total_ns);
  counted.compute_ns += static_cast<uint64_t>(timing.compute_ns);
  counted.communication_ns += static_cast<uint64_t>(timing.communication_ns);
  counted.overhead_ns += static_cast<uint64_t>(now_ns() - answered + sent - begin);
}

void Engine::State::idle_step() {
  writer.begin(StepKind::kIdle, options.generation, next_step);
  executor.send(writer.finish());
  ++next_step;
  (void)executor.wait(Deadline::in_seconds(options.step_seconds), nullptr);
  last_plan = Clock::now();
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
    GenerateEvent event = event_of(s);
    event.finish = FinishReason::kError;
    event.error = Error(
        Code::kInternal,
        fmt::format("the model's logits for the token at position {} are not finite numbers; only "
                    "this request is affected",
                    s.length()));
    finish(s, std::move(event));
    return;
  }
  s.tokens.push_back(result.token);
  if (s.counts) s.counts->add_output(result.token);
  if (s.outputs() == 1) counted.prompt_tokens += static_cast<uint64_t>(s.prompt_count);
  ++counted.output_tokens;
  GenerateEvent event = event_of(s);
  event.token = result.token;
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
  for (size_t i = before; i < retired.size(); ++i) active.erase(retired[i]->id);
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
  executor.abort(error.what());
}

// --- Any thread ------------------------------------------------------------------------------

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
  if (!done) s.executor.abort("the engine stopped while a step was being computed");
  s.thread.join();
}

SubmitResult Engine::submit(GenerateRequest request, std::shared_ptr<EventSink> sink,
                            std::string* detail) {
  State& s = *state_;
  const EngineOptions& o = s.options;
  const auto refuse = [&](SubmitResult result, std::string text) {
    if (detail != nullptr) *detail = std::move(text);
    return result;
  };
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  if (prompt == 0) {
    return refuse(SubmitResult::kBadParameter, "the prompt has 0 tokens, at least 1 is needed");
  }
  const int64_t slots = o.blocks * o.block_size;
  if (prompt > o.max_input_tokens) {
    return refuse(SubmitResult::kPromptTooLong,
                  fmt::format("the prompt has {} tokens, at most {} are allowed "
                              "(maxInputTokenLen)",
                              prompt, o.max_input_tokens));
  }
  if (prompt > o.max_sequence - 1) {
    return refuse(SubmitResult::kPromptTooLong,
                  fmt::format("the prompt has {} tokens, at most {} leave room for one more in a "
                              "sequence of {} (maxSeqLen)",
                              prompt, o.max_sequence - 1, o.max_sequence));
  }
  if (prompt > slots) {
    return refuse(SubmitResult::kPromptTooLong,
                  fmt::format("the prompt has {} tokens, the whole KV cache holds {} ({} blocks of "
                              "{})",
                              prompt, slots, o.blocks, o.block_size));
  }
  for (size_t i = 0; i < request.prompt.size(); ++i) {
    if (request.prompt[i] >= 0 && request.prompt[i] < o.vocab_size) continue;
    return refuse(SubmitResult::kBadToken,
                  fmt::format("token {} of the prompt is {}, the vocabulary has ids 0 to {}", i,
                              request.prompt[i], o.vocab_size - 1));
  }
  if (auto wrong = check_sampling(request.sampling)) {
    return refuse(SubmitResult::kBadParameter, std::move(*wrong));
  }

  auto sequence = std::make_unique<Sequence>();
  sequence->params = std::move(request.sampling);
  const SamplingParams& params = sequence->params;
  const int64_t outputs =
      std::min({int64_t{params.max_tokens}, o.max_output_tokens, o.max_sequence - prompt,
                slots + 1 - prompt});  // the last token needs no slot
  sequence->id = std::move(request.id);
  sequence->sink = std::move(sink);
  sequence->prompt_count = static_cast<int32_t>(prompt);
  sequence->max_outputs = static_cast<int32_t>(outputs);
  sequence->tokens = std::move(request.prompt);
  sequence->tokens.reserve(static_cast<size_t>(prompt + outputs));
  sequence->blocks.reserve(
      static_cast<size_t>((prompt + outputs + o.block_size - 1) / o.block_size));
  if (params.seed) {
    sequence->seed = *params.seed;
  } else {
    std::random_device device;
    sequence->seed = uint64_t{device()} << 32 | device();
  }
  if (has_penalty(params)) {
    sequence->counts.emplace(o.vocab_size, prompt + outputs);
    for (const int32_t token : sequence->tokens) sequence->counts->add_prompt(token);
  }

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
  if (waiting >= o.max_queue) {
    return refuse(SubmitResult::kQueueFull,
                  fmt::format("{} requests are waiting, at most {} may", waiting, o.max_queue));
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
  state_->executor.abort(failure()->what());
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

EngineStats Engine::stats() const {
  const std::lock_guard lock(state_->mutex);
  EngineStats stats = state_->stats;
  stats.waiting += std::ssize(state_->inbox);
  return stats;
}

const EngineOptions& Engine::options() const { return state_->options; }

}  // namespace phalanx::engine
