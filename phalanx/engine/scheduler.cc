#include "phalanx/engine/scheduler.h"

#include <algorithm>

#include "phalanx/base/check.h"

namespace phalanx::engine {

Scheduler::Scheduler(const SchedulerOptions& options) : options_(options), pool_(options.blocks) {
  running_.reserve(static_cast<size_t>(options.max_batch));
  sampled_.reserve(static_cast<size_t>(options.max_batch));
}

int64_t Scheduler::blocks_for(int64_t tokens) const {
  return (tokens + options_.block_size - 1) / options_.block_size;
}

void Scheduler::add(std::unique_ptr<Sequence> sequence) { waiting_.push_back(std::move(sequence)); }

void Scheduler::preempt_youngest() {
  std::unique_ptr<Sequence> victim = std::move(running_.back());
  running_.pop_back();
  pool_.release(victim->blocks);
  victim->computed = 0;
  ++preemptions_;
  waiting_.push_front(std::move(victim));
}

// Gives every running sequence the blocks for its newest token. True if one had to leave for it.
bool Scheduler::make_room() {
  const uint64_t before = preemptions_;
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence* const sequence = running_[i].get();
    const int64_t missing = blocks_for(sequence->length()) - std::ssize(sequence->blocks);
    if (missing <= 0) continue;
    bool present = true;
    while (present && !pool_.allocate(missing, sequence->blocks)) {
      present = running_.back().get() != sequence;
      preempt_youngest();
    }
  }
  return preemptions_ != before;
}

// Waiting sequences that begin in this step.
void Scheduler::admit(int64_t prefills, int64_t budget) {
  while (!waiting_.empty() && running() < options_.max_batch &&
         prefills < options_.max_prefill_batch && budget > 0) {
    Sequence& next = *waiting_.front();
    const int64_t blocks = blocks_for(next.length());
    // Some blocks stay free for those that already run, lest it be thrown out at once.
    const int64_t reserve = std::min(running(), options_.blocks / 64 + 1);
    if (blocks + reserve > pool_.free() || !pool_.allocate(blocks, next.blocks)) return;
    next.planned = static_cast<int32_t>(std::min<int64_t>(budget, next.length()));
    budget -= next.planned;
    ++prefills;
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

bool Scheduler::plan(StepPlanWriter& writer) {
  const bool crowded = make_room();
  int64_t decodes = 0;
  for (const auto& s : running_) decodes += s->computed == s->length() - 1 ? 1 : 0;
  int64_t budget =
      std::min(options_.max_prefill_tokens, options_.max_step_tokens - decodes);
  int64_t prefills = 0;
  for (const auto& s : running_) {
    const int64_t left = s->length() - s->computed;
    if (left == 1) {
      s->planned = 1;
    } else if (budget > 0 && prefills < options_.max_prefill_batch) {
      s->planned = static_cast<int32_t>(std::min(budget, left));
      budget -= s->planned;
      ++prefills;
    }
  }
  if (!crowded) admit(prefills, budget);

  sampled_.clear();
  bool any = false;
  for (const auto& s : running_) {
    if (s->planned == 0) continue;
    any = true;
    const int32_t context = s->computed + s->planned;
    const bool sample = context == s->length();
    writer.add_sequence(std::span<const int32_t>(s->tokens)
                            .subspan(static_cast<size_t>(s->computed),
                                     static_cast<size_t>(s->planned)),
                        context, s->blocks, static_cast<int32_t>(options_.block_size), sample,
                        s->tag);
    if (sample) sampled_.push_back(s.get());
  }
  return any;
}

void Scheduler::advance() {
  for (const auto& s : running_) {
    s->computed += s->planned;
    s->planned = 0;
  }
}

void Scheduler::collect(std::vector<std::unique_ptr<Sequence>>& finished) {
  const auto sweep = [&](auto& list) {
    const auto keep = std::stable_partition(list.begin(), list.end(),
                                            [](const auto& s) { return !s->finished; });
    for (auto it = keep; it != list.end(); ++it) {
      pool_.release((*it)->blocks);
      finished.push_back(std::move(*it));
    }
    list.erase(keep, list.end());
  };
  sweep(running_);
  sweep(waiting_);
}

}  // namespace phalanx::engine
