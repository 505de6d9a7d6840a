#include "phalanx/api/beam_search.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

namespace phalanx::api {

using engine::FinishReason;
using engine::GenerateEvent;
using engine::SubmitResult;

class BeamSearch::Sink final : public engine::EventSink {
 public:
  Sink(std::shared_ptr<BeamSearch> search, int step, size_t beam)
      : search_(std::move(search)), step_(step), beam_(beam) {}
  void on_event(GenerateEvent event) override { search_->on_event(step_, beam_, std::move(event)); }

 private:
  std::shared_ptr<BeamSearch> search_;
  int step_;
  size_t beam_;
};

BeamSearch::BeamSearch(BeamOptions options, EnginePort& engine, std::shared_ptr<WorkQueue> work,
                       Deliver deliver)
    : options_(std::move(options)),
      engine_(engine),
      work_(std::move(work)),
      deliver_(std::move(deliver)),
      running_(1) {}

double BeamSearch::score(const Beam& beam) const {
  return beam.sum / std::pow(std::max<double>(1, static_cast<double>(beam.tokens.size())),
                             options_.length_penalty);
}

SubmitResult BeamSearch::start(std::string* detail) { return submit_step(detail); }

// One request per running beam. Nothing else touches the search meanwhile.
SubmitResult BeamSearch::submit_step(std::string* detail) {
  std::vector<engine::GenerateRequest> requests;
  int step = 0;
  {
    const std::lock_guard lock(mutex_);
    step = step_;
    answers_.assign(running_.size(), {});
    missing_ = running_.size();
    for (size_t i = 0; i < running_.size(); ++i) {
      engine::GenerateRequest request;
      request.id = fmt::format("{}.{}.{}", options_.id, step, i);
      request.prompt = options_.prompt;
      request.prompt.insert(request.prompt.end(), running_[i].tokens.begin(), running_[i].tokens.end());
      request.sampling.temperature = 0;
      request.sampling.max_tokens = 1;
      request.sampling.logprobs =
          std::max(options_.logprobs,
                   2 * options_.width + static_cast<int32_t>(options_.stop_token_ids.size()));
      request.priority = options_.priority;
      request.adapter = options_.adapter;
      request.client = options_.client;
      requests.push_back(std::move(request));
    }
  }
  for (size_t i = 0; i < requests.size(); ++i) {
    const SubmitResult result = engine_.submit(
        std::move(requests[i]), std::make_shared<Sink>(shared_from_this(), step, i), detail);
    if (result != SubmitResult::kAccepted) return result;
  }
  return SubmitResult::kAccepted;
}

void BeamSearch::cancel() {
  std::vector<std::string> ids;
  {
    const std::lock_guard lock(mutex_);
    deliver_ = nullptr;
    for (size_t i = 0; i < running_.size(); ++i)
      ids.push_back(fmt::format("{}.{}.{}", options_.id, step_, i));
  }
  for (const std::string& id : ids) engine_.cancel(id);
}

void BeamSearch::on_event(int step, size_t beam, GenerateEvent event) {
  bool all = false;
  Deliver failed;
  {
    const std::lock_guard lock(mutex_);
    if (!deliver_ || step != step_ || answers_[beam].arrived) return;
    if (event.finish == FinishReason::kError || event.finish == FinishReason::kCancelled) {
      failed = std::exchange(deliver_, nullptr);
    } else {
      answers_[beam] = {std::move(event.top), true};
      all = --missing_ == 0;
    }
  }
  if (failed) return failed(0, std::move(event));
  if (all) work_->post([self = shared_from_this()] { self->advance(); });
}

// All answers of the step are there.
void BeamSearch::advance() {
  struct Candidate {
    double sum;
    size_t parent;
    engine::TokenLogprob token;
  };
  bool ended = false;
  {
    const std::lock_guard lock(mutex_);
    if (!deliver_) return;
    std::vector<Candidate> candidates;
    for (size_t i = 0; i < running_.size(); ++i)
      for (const auto& token : answers_[i].top)
        candidates.push_back({running_[i].sum + static_cast<double>(token.logprob), i, token});
    std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
      return std::tuple(-a.sum, a.parent, a.token.token) < std::tuple(-b.sum, b.parent, b.token.token);
    });
    const auto width = static_cast<size_t>(options_.width);
    std::vector<Beam> next;
    size_t rank = 0;
    for (const Candidate& c : candidates) {
      const bool stops = std::find(options_.stop_token_ids.begin(), options_.stop_token_ids.end(),
                                   c.token.token) != options_.stop_token_ids.end();
      if (stops && step_ < options_.min_tokens) continue;
      // An end counts only where it is among the best.
      if (stops && rank >= width) continue;
      ++rank;
      Beam beam = running_[c.parent];
      beam.tokens.push_back(c.token.token);
      beam.logprobs.push_back(c.token.logprob);
      auto top = answers_[c.parent].top;
      top.resize(std::min(top.size(), static_cast<size_t>(std::max(0, options_.logprobs))));
      beam.tops.push_back(std::move(top));
      beam.sum = c.sum;
      beam.stopped = stops;
      (stops ? finished_ : next).push_back(std::move(beam));
      if (next.size() == width) break;
    }
    running_ = std::move(next);
    ++step_;
    const auto better = [this](const Beam& a, const Beam& b) { return score(a) > score(b); };
    std::stable_sort(finished_.begin(), finished_.end(), better);
    if (finished_.size() > width) finished_.resize(width);
    const auto length = static_cast<int64_t>(options_.prompt.size()) + step_;
    const bool beaten = finished_.size() == width && !running_.empty() &&
                        score(finished_.back()) >= score(running_.front());
    ended = running_.empty() || beaten || step_ >= options_.max_tokens || length >= options_.max_sequence;
  }
  if (ended) return finish();
  std::string detail;
  const SubmitResult result = submit_step(&detail);
  if (result == SubmitResult::kAccepted) return;
  fail(Error(Code::kUnavailable, "a step of the beam search was not taken: " + detail));
}

void BeamSearch::fail(const Error& error) {
  Deliver deliver;
  {
    const std::lock_guard lock(mutex_);
    deliver = std::exchange(deliver_, nullptr);
  }
  if (deliver) deliver(0, {.finish = FinishReason::kError, .error = error});
}

void BeamSearch::finish() {
  Deliver deliver;
  std::vector<Beam> best;
  {
    const std::lock_guard lock(mutex_);
    deliver = std::exchange(deliver_, nullptr);
    best = std::move(finished_);
    std::move(running_.begin(), running_.end(), std::back_inserter(best));
    running_.clear();
  }
  if (!deliver) return;
  std::stable_sort(best.begin(), best.end(),
                   [this](const Beam& a, const Beam& b) { return score(a) > score(b); });
  for (size_t i = 0; i < static_cast<size_t>(options_.returned); ++i) {
    // Fewer beams than wanted exist only in tiny vocabularies: the last is repeated.
    const Beam& beam = best[std::min(i, best.size() - 1)];
    for (size_t t = 0; t < beam.tokens.size(); ++t) {
      GenerateEvent event;
      event.token = beam.tokens[t];
      event.logprob = beam.logprobs[t];
      event.top = beam.tops[t];
      event.prompt_tokens = static_cast<int32_t>(options_.prompt.size());
      event.output_tokens = static_cast<int32_t>(t + 1);
      if (t + 1 == beam.tokens.size()) {
        event.finish = beam.stopped ? FinishReason::kStop : FinishReason::kLength;
        if (beam.stopped) event.stop_token = event.token;
      }
      deliver(i, std::move(event));
    }
  }
}

}  // namespace phalanx::api
