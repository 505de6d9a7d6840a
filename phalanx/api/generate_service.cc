#include "phalanx/api/generate_service.h"

#include <fmt/format.h>

#include <algorithm>
#include <deque>

#include "phalanx/api/beam_search.h"
#include "phalanx/base/heap_trim.h"
#include "phalanx/base/log.h"
#include "phalanx/text/stop_matcher.h"

namespace phalanx::api {
namespace {

using engine::FinishReason;
using engine::GenerateEvent;
using engine::SubmitResult;

constexpr int64_t kMaxPromptTokens = 1048576;
constexpr auto kWatchInterval = std::chrono::milliseconds(50);
constexpr uint64_t kRoundsPerSecond = 20;
constexpr int kStoppingRetrySeconds = 5;
const std::string kEnqueue = "Failed to enqueue inferRequest. ";

double seconds_since(Clock::time_point t) {
  return std::chrono::duration<double>(Clock::now() - t).count();
}

// The client set this limit, so it is no fault of the server's.
Refusal client_timeout() {
  Refusal refusal = incomplete_generation("Engine callback timeout: client timeout");
  refusal.status = 408;
  return refusal;
}

Refusal refusal_of(SubmitResult result, const std::string& detail) {
  switch (result) {
    case SubmitResult::kQueueFull:
      return unavailable("The request queue is full, try again later. " + detail, 1);
    case SubmitResult::kPromptTooLong:
      return generation_error(kEnqueue + (detail.empty() ? "The prompt is too long" : detail));
    case SubmitResult::kBadToken:
      return generation_error(kEnqueue + "Invalid Input Ids");
    case SubmitResult::kBadParameter:
      return {.status = 422, .error_type = "Input Validation Error", .error = detail};
    case SubmitResult::kUnknownAdapter:
      return not_found(kEnqueue + detail);
    case SubmitResult::kStopped: {
      Refusal refusal =
          incomplete_generation(kEnqueue + "Engine has been stopped. Cannot add request.");
      if (!detail.empty()) refusal.error += " " + detail;
      return refusal;
    }
    case SubmitResult::kDuplicateId:
    case SubmitResult::kAccepted:
      break;
  }
  return incomplete_generation(kEnqueue + detail);
}

}  // namespace

// An actor: what happens (tokens, a client that leaves, a time-out) is put into an inbox from any
// thread and handled on a work thread, one at a time.
class GenerateService::Generation final : public std::enable_shared_from_this<Generation> {
 public:
  enum class Signal { kEvent, kGone, kStopped, kTokenTimeout, kTotalTimeout, kClientTimeout };

  Generation(GenerateSpec spec, std::unique_ptr<Answer> answer, const ServiceOptions& options,
             EnginePort& engine, std::shared_ptr<const TextPort> text,
             std::shared_ptr<WorkQueue> work, Metrics& metrics,
             std::shared_ptr<std::atomic<int64_t>> active, const std::string& id)
      : spec_(std::move(spec)),
        answer_(std::move(answer)),
        engine_(engine),
        text_(std::move(text)),
        work_(std::move(work)),
        metrics_(metrics),
        active_(std::move(active)),
        eos_ids_(options.defaults.eos_token_ids),
        max_sequence_(options.max_sequence),
        progress_ns_(now_ns()) {
    active_->fetch_add(1);
    const size_t choices = spec_.prompts.size() * static_cast<size_t>(spec_.sequences);
    for (size_t i = 0; i < choices; ++i) {
      Sequence sequence;
      sequence.id = choices == 1 ? id : fmt::format("{}.{}", id, i);
      sequence.stream = text_->open(spec_.skip_special);
      if (!spec_.stops.empty()) sequence.matcher.emplace(spec_.stops, spec_.include_stop);
      sequences_.push_back(std::move(sequence));
    }
  }
  ~Generation() {
    if (!over_) active_->fetch_sub(1);
  }

  // Throws Refused; then nothing of it is left in the engine. Events wait in the inbox meanwhile.
  void submit() {
    metrics_.received();
    if (spec_.beam_width > 0) {
      submit_beams();
      return open_inbox();
    }
    for (size_t i = 0; i < sequences_.size(); ++i) {
      std::string detail;
      const SubmitResult result = engine_.submit(request_for(i), std::make_shared<Sink>(*this, i),
                                                 &detail);
      if (result == SubmitResult::kAccepted) continue;
      end(false);
      for (size_t k = 0; k < i; ++k) engine_.cancel(sequences_[k].id);
      throw Refused(refusal_of(result, detail));
    }
    open_inbox();
  }

  void put(Signal signal, size_t sequence = 0, GenerateEvent event = {}) {
    {
      const std::lock_guard lock(mutex_);
      inbox_.push_back({signal, sequence, std::move(event)});
    }
    schedule();
  }

  [[nodiscard]] const std::string& name() const { return spec_.name; }
  [[nodiscard]] bool over() const { return over_; }

  // Called about every kWatchInterval; false when there is nothing to watch any more.
  bool check_time(const ServiceOptions& options) {
    if (over_) return false;
    const double since_progress = static_cast<double>(now_ns() - progress_ns_.load()) * 1e-9;
    const double since_received = seconds_since(spec_.received);
    if ((spec_.stream ? since_progress : since_received) > options.token_timeout_s)
      put(Signal::kTokenTimeout);
    else if (since_received > options.e2e_timeout_s)
      put(Signal::kTotalTimeout);
    else if (spec_.client_timeout_s && since_received > *spec_.client_timeout_s)
      put(Signal::kClientTimeout);
    return true;
  }

 private:
  struct Sequence {
    std::string id;
    std::unique_ptr<TokenStream> stream;
    std::optional<text::StopMatcher> matcher;
    std::vector<TokenPiece> tokens;
    std::vector<engine::PromptLogprob> prompt;
    bool done = false;
    bool counted_prompt = false;
    int64_t prompt_tokens = 0, output_tokens = 0, cached_tokens = 0;
    double cumulative_logprob = 0;
    Clock::time_point last_token{};
  };
  struct Item {
    Signal signal;
    size_t sequence;
    GenerateEvent event;
  };
  class Sink final : public engine::EventSink {
   public:
    Sink(Generation& generation, size_t sequence)
        : generation_(generation.shared_from_this()), sequence_(sequence) {}
    void on_event(GenerateEvent event) override {
      generation_->put(Signal::kEvent, sequence_, std::move(event));
    }

   private:
    std::shared_ptr<Generation> generation_;
    size_t sequence_;
  };

  engine::GenerateRequest request_for(size_t i) const {
    engine::GenerateRequest request;
    request.id = sequences_[i].id;
    request.prompt = spec_.prompts[i / static_cast<size_t>(spec_.sequences)];
    request.sampling = spec_.sampling;
    auto& stop_ids = request.sampling.stop_token_ids;
    if (!spec_.ignore_eos) stop_ids.insert(stop_ids.end(), eos_ids_.begin(), eos_ids_.end());
    if (request.sampling.seed) *request.sampling.seed += i % static_cast<size_t>(spec_.sequences);
    request.priority = spec_.priority;
    request.adapter = spec_.adapter;
    request.client = spec_.client;
    if (spec_.make_guide) request.sampling.guide = spec_.make_guide();
    if (spec_.sequences > 1) request.sampling.logprobs = std::max(0, request.sampling.logprobs);
    return request;
  }

  void open_inbox() {
    {
      const std::lock_guard lock(mutex_);
      scheduled_ = false;
    }
    schedule();
  }

  // One search per prompt; its beams are the prompt's sequences.
  void submit_beams() {
    const auto each = static_cast<size_t>(spec_.sequences);
    for (size_t prompt = 0; prompt < spec_.prompts.size(); ++prompt) {
      const engine::GenerateRequest request = request_for(prompt * each);
      BeamOptions options{.id = fmt::format("{}.beams.{}", sequences_[0].id, prompt),
                          .prompt = request.prompt,
                          .width = spec_.beam_width,
                          .returned = spec_.sequences,
                          .length_penalty = spec_.length_penalty,
                          .max_tokens = request.sampling.max_tokens,
                          .min_tokens = request.sampling.min_tokens,
                          .max_sequence = max_sequence_,
                          .stop_token_ids = request.sampling.stop_token_ids,
                          .logprobs = spec_.sampling.logprobs,
                          .priority = spec_.priority,
                          .adapter = spec_.adapter,
                          .client = spec_.client};
      auto search = std::make_shared<BeamSearch>(
          std::move(options), engine_, work_,
          // Kept alive by its searches, as by the sinks of other requests.
          [self = shared_from_this(), first = prompt * each](size_t beam, GenerateEvent event) {
            self->put(Signal::kEvent, first + beam, std::move(event));
          });
      beams_.push_back(search);
      std::string detail;
      const SubmitResult result = search->start(&detail);
      if (result == SubmitResult::kAccepted) continue;
      end(false);
      cancel_rest();
      throw Refused(refusal_of(result, detail));
    }
  }

  void schedule() {
    {
      const std::lock_guard lock(mutex_);
      if (scheduled_ || inbox_.empty()) return;
      scheduled_ = true;
    }
    work_->post([self = shared_from_this()] { self->drain(); });
  }

  void drain() {
    std::deque<Item> items;
    for (;;) {
      {
        const std::lock_guard lock(mutex_);
        if (inbox_.empty()) {
          scheduled_ = false;
          return;
        }
        items.clear();
        items.swap(inbox_);
      }
      for (Item& item : items) {
        if (over_) continue;
        try {
          handle(item);
        } catch (const std::exception& e) {
          log_error("Request {}: {}", sequences_[0].id, e.what());
          fail(incomplete_generation(fmt::format("Failed to get engine response. {}", e.what())));
        }
      }
    }
  }

  void handle(Item& item) {
    switch (item.signal) {
      case Signal::kEvent:
        return token(item.sequence, item.event);
      case Signal::kGone:
        end(false);
        cancel_rest();
        answer_.reset();
        return;
      case Signal::kStopped:
        return stop_all();
      case Signal::kTokenTimeout:
        return fail(incomplete_generation("Engine callback timeout: server tokenTimeout"));
      case Signal::kTotalTimeout:
        return fail(incomplete_generation("Engine callback timeout: server e2eTimeout"));
      case Signal::kClientTimeout:
        return fail(client_timeout());
    }
  }

  void token(size_t index, GenerateEvent& event) {
    Sequence& sequence = sequences_[index];
    if (sequence.done) return;
    progress_ns_ = now_ns();
    // Whoever asks again later may be answered.
    if (event.finish == FinishReason::kError && event.error &&
        event.error->code() == Code::kCancelled)
      return fail(unavailable(fmt::format("Failed to get engine response. {}", event.error->what()),
                              kStoppingRetrySeconds));
    if (event.finish == FinishReason::kError)
      return fail(incomplete_generation(fmt::format(
          "Failed to get engine response. {}", event.error ? event.error->what() : "unknown error")));
    if (event.finish == FinishReason::kCancelled)
      return fail(unavailable(
          "Failed to get engine response. The request was ended because the service stops",
          kStoppingRetrySeconds));
    if (event.prompt_tokens > 0) sequence.prompt_tokens = event.prompt_tokens;
    sequence.output_tokens = std::max<int64_t>(sequence.output_tokens, event.output_tokens);
    queue_ns_ = std::max(queue_ns_, event.queue_ns);
    sequence.cached_tokens = std::max<int64_t>(sequence.cached_tokens, event.cached_tokens);
    if (!started_) {
      started_ = true;
      answer_->start();
    }

    Piece piece{.choice = static_cast<int>(index), .finish = event.finish};
    std::string text;
    if (event.token >= 0) {
      observe(sequence);
      sequence.cumulative_logprob += event.logprob;
      // A token that stops is not part of the text, unless asked for.
      const bool hidden = event.finish == FinishReason::kStop && !spec_.include_stop;
      if (!hidden) text = sequence.stream->push(event.token);
      // Who scores a prompt counts tokens from the end and needs this one too.
      const bool listed = !hidden || spec_.sampling.prompt_logprobs >= 0;
      if (listed && (spec_.sampling.logprobs >= 0 || spec_.want_tokens))
        sequence.tokens.push_back(piece_of(event));
    }
    if (event.finish != FinishReason::kNone) text += sequence.stream->flush();
    piece.text = std::move(text);
    if (!event.prompt.empty()) sequence.prompt = std::move(event.prompt);
    if (sequence.matcher) match(sequence, &piece);
    if (piece.finish == FinishReason::kStop && event.finish == FinishReason::kStop &&
        std::holds_alternative<std::monostate>(piece.stop_reason)) {
      const auto& own = spec_.sampling.stop_token_ids;
      if (std::find(own.begin(), own.end(), event.stop_token) != own.end())
        piece.stop_reason = event.stop_token;
    }
    end_piece(index, std::move(piece), event.finish != FinishReason::kNone);
  }

  // The client asked for the end: what is there is the answer.
  void stop_all() {
    if (!started_) {
      started_ = true;
      answer_->start();
    }
    for (size_t i = 0; i < sequences_.size(); ++i) {
      if (sequences_[i].done || over_) continue;
      Piece piece{.choice = static_cast<int>(i), .finish = FinishReason::kCancelled};
      piece.text = sequences_[i].stream->flush();
      end_piece(i, std::move(piece), false);
    }
  }

  // `ended`: the engine is through with the sequence.
  void end_piece(size_t index, Piece piece, bool ended) {
    Sequence& sequence = sequences_[index];
    const bool last = piece.finish != FinishReason::kNone;
    if (!last && piece.text.empty()) return;
    piece.tokens = std::exchange(sequence.tokens, {});
    piece.prompt = std::exchange(sequence.prompt, {});
    sequence.done = last;
    if (last && !ended) engine_.cancel(sequence.id);
    answer_->piece(piece, usage());
    if (!last || !std::all_of(sequences_.begin(), sequences_.end(),
                              [](const Sequence& s) { return s.done; }))
      return;
    Outcome outcome{.usage = usage(), .cumulative_logprob = {}};
    for (const Sequence& s : sequences_) outcome.cumulative_logprob.push_back(s.cumulative_logprob);
    metrics_.succeeded(seconds_since(spec_.received), outcome.usage.prompt_tokens,
                       outcome.usage.completion_tokens);
    end(true);
    answer_->finish(outcome);
    answer_.reset();
  }

  void match(Sequence& sequence, Piece* piece) {
    const bool at_end = piece->finish != FinishReason::kNone;
    text::StopMatcher::Result result = sequence.matcher->push(piece->text);
    piece->text = std::move(result.emit);
    if (result.stopped) {
      piece->finish = FinishReason::kStop;
      piece->stop_reason = std::move(result.matched);
    } else if (at_end) {
      piece->text += sequence.matcher->flush();
    }
  }

  static TokenPiece piece_of(const GenerateEvent& event) {
    TokenPiece piece{.id = event.token, .logprob = event.logprob, .top = {}};
    for (const auto& top : event.top) piece.top.push_back({top.token, top.logprob});
    return piece;
  }

  void observe(Sequence& sequence) {
    const auto now = Clock::now();
    if (sequence.last_token == Clock::time_point{})
      metrics_.first_token(seconds_since(spec_.received));
    else
      metrics_.next_token(std::chrono::duration<double>(now - sequence.last_token).count());
    sequence.last_token = now;
  }

  // A prompt counts once however many sequences continue it.
  [[nodiscard]] Usage usage() const {
    Usage usage;
    usage.queue_ms = queue_ns_ / 1000000;
    for (size_t i = 0; i < sequences_.size(); ++i) {
      usage.completion_tokens += sequences_[i].output_tokens;
      if (i % static_cast<size_t>(spec_.sequences) != 0) continue;
      usage.prompt_tokens +=
          static_cast<int64_t>(spec_.prompts[i / static_cast<size_t>(spec_.sequences)].size());
      usage.cached_tokens += sequences_[i].cached_tokens;
    }
    return usage;
  }

  void fail(const Refusal& refusal) {
    end(false);
    cancel_rest();
    answer_->fail(refusal);
    answer_.reset();
  }

  void cancel_rest() {
    for (const auto& search : beams_) search->cancel();
    for (Sequence& sequence : sequences_) {
      if (!sequence.done) engine_.cancel(sequence.id);
      sequence.done = true;
    }
  }

  void end(bool succeeded) {
    if (over_.exchange(true)) return;
    active_->fetch_sub(1);
    if (!succeeded) metrics_.failed();
  }

  const GenerateSpec spec_;
  std::unique_ptr<Answer> answer_;
  EnginePort& engine_;
  std::shared_ptr<const TextPort> text_;
  std::shared_ptr<WorkQueue> work_;
  Metrics& metrics_;
  std::shared_ptr<std::atomic<int64_t>> active_;
  const std::vector<int32_t> eos_ids_;
  const int64_t max_sequence_;
  std::vector<Sequence> sequences_;
  std::vector<std::shared_ptr<BeamSearch>> beams_;
  bool started_ = false;
  std::atomic<bool> over_{false};
  std::atomic<int64_t> progress_ns_;
  int64_t queue_ns_ = 0;  // the longest of the sequences' waits

  std::mutex mutex_;
  std::deque<Item> inbox_;
  bool scheduled_ = true;  // until submit() is through
};

GenerateService::GenerateService(const ServiceOptions& options, EnginePort& engine,
                                 std::shared_ptr<const TextPort> text,
                                 std::shared_ptr<WorkQueue> work, Metrics& metrics)
    : options_(options),
      engine_(engine),
      text_(std::move(text)),
      work_(std::move(work)),
      metrics_(metrics),
      watcher_([this](const std::stop_token& stop) { watch(stop); }) {}

void GenerateService::stop() {
  watcher_.request_stop();
  if (watcher_.joinable()) watcher_.join();
  const std::lock_guard lock(mutex_);
  for (const auto& weak : running_)
    if (const auto generation = weak.lock()) generation->put(Generation::Signal::kGone);
}

bool GenerateService::stop_named(const std::string& name) {
  const std::lock_guard lock(mutex_);
  bool found = false;
  for (const auto& weak : running_) {
    const auto generation = weak.lock();
    if (!generation || generation->name() != name || generation->over()) continue;
    generation->put(Generation::Signal::kStopped);
    found = true;
  }
  return found;
}

void GenerateService::watch(const std::stop_token& stop) {
  HeapTrim heap;
  for (uint64_t round = 0; !stop.stop_requested(); ++round) {
    std::this_thread::sleep_for(kWatchInterval);
    if (round % kRoundsPerSecond == 0) {
      metrics_.tick(engine_.stats());
      if (active() == 0) heap.when_idle();
    }
    const std::lock_guard lock(mutex_);
    std::erase_if(running_, [this](const std::weak_ptr<Generation>& weak) {
      const auto generation = weak.lock();
      return !generation || !generation->check_time(options_);
    });
  }
}

void GenerateService::check_prompt(std::vector<int32_t>* ids) const {
  auto length = static_cast<int64_t>(ids->size());
  if (length < 1 || length > kMaxPromptTokens)
    throw Refused(fmt::format("Messages token length must be in (0, {}], but got {}. This could be "
                              "caused by invalid input format or empty content.",
                              kMaxPromptTokens, length));
  if (options_.vocab_size > 0 && std::any_of(ids->begin(), ids->end(), [this](int32_t id) {
        return id < 0 || id >= options_.vocab_size;
      }))
    throw Refused(generation_error(kEnqueue + "Invalid Input Ids"));
  if (options_.truncation != 0 && length > options_.max_input_tokens) {
    if (options_.truncation > 0) ids->erase(ids->begin(), ids->end() - options_.max_input_tokens);
    ids->resize(static_cast<size_t>(options_.max_input_tokens));
    length = options_.max_input_tokens;
  }
  const auto refuse_above = [&](int64_t limit, const char* name) {
    if (limit > 0 && length > limit)
      throw Refused(generation_error(fmt::format(
          "{}This model's maximum input ids length cannot be greater than {}{},the input ids length "
          "is {}",
          kEnqueue, name, limit, length)));
  };
  refuse_above(options_.max_position_embeddings, "maxPositionEmbeddings ");
  refuse_above(options_.max_input_tokens, "");
  refuse_above(options_.max_sequence, "maxSeqLen ");
}

void GenerateService::start(GenerateSpec spec, std::unique_ptr<Answer> answer,
                            const std::shared_ptr<Responder>& responder) {
  const std::string id = fmt::format("{}", next_id_.fetch_add(1));
  auto generation =
      std::make_shared<Generation>(std::move(spec), std::move(answer), options_, engine_, text_, work_,
                                   metrics_, active_, id);
  responder->on_disconnect([weak = std::weak_ptr(generation)] {
    if (const auto alive = weak.lock()) alive->put(Generation::Signal::kGone);
  });
  {
    const std::lock_guard lock(mutex_);
    running_.push_back(generation);
  }
  generation->submit();
}

}  // namespace phalanx::api
