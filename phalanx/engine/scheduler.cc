#include "phalanx/engine/scheduler.h"

#include <algorithm>

#include "phalanx/base/check.h"
#include "phalanx/base/clock.h"

namespace phalanx::engine {

namespace {

constexpr size_t kKnownClients = 4096;
constexpr int64_t kCatchUp = 256;  // tokens that the draft model was behind, in one step

// Those that ran before keep their own order at the front.
bool comes_before(const std::unique_ptr<Sequence>& a, const std::unique_ptr<Sequence>& b) {
  if (a->begun || b->begun) return a->begun && !b->begun;
  if (a->level != b->level) return a->level < b->level;
  return a->turn != b->turn ? a->turn < b->turn : a->submitted_ns < b->submitted_ns;
}

}  // namespace

Scheduler::Scheduler(const SchedulerOptions& options)
    : options_(options),
      pool_({.blocks = options.blocks,
             .block_size = options.block_size,
             .share_prefixes = options.share_prefixes}),
      pace_(options.decode_stretch) {
  running_.reserve(static_cast<size_t>(options.max_batch));
  rows_.reserve(static_cast<size_t>(options.max_batch));
  if (has_draft_model()) block_followed_.resize(static_cast<size_t>(options.blocks));
}

int64_t Scheduler::blocks_for(int64_t tokens) const {
  return (tokens + options_.block_size - 1) / options_.block_size;
}

// Every client's sequences get turns that rise from the newest one that began, so those of a client
// with many waiting lie between those of others.
void Scheduler::add(std::unique_ptr<Sequence> sequence) {
  if (turns_.size() >= kKnownClients)
    std::erase_if(turns_, [&](const auto& client) { return client.second <= turn_; });
  uint64_t& last = turns_[sequence->client];
  last = std::max(last, turn_) + 1;
  sequence->turn = last;
  const auto at = std::upper_bound(waiting_.begin(), waiting_.end(), sequence, comes_before);
  waiting_.insert(at, std::move(sequence));
}

void Scheduler::preempt_youngest() {
  std::unique_ptr<Sequence> victim = std::move(running_.back());
  running_.pop_back();
  pool_.release(victim->blocks);
  victim->computed = 0;
  victim->published = 0;
  victim->followed = 0;
  victim->draft.clear();
  ++preemptions_;
  waiting_.push_front(std::move(victim));
}

// More blocks for a sequence, which the draft model has not seen.
bool Scheduler::allocate(int64_t count, Sequence& s) {
  const size_t before = s.blocks.size();
  if (!pool_.allocate(count, s.blocks)) return false;
  if (has_draft_model())
    for (size_t i = before; i < s.blocks.size(); ++i)
      block_followed_[static_cast<size_t>(s.blocks[i])] = false;
  return true;
}

// Gives every running sequence the blocks for its newest token. True if one had to leave for it.
bool Scheduler::make_room() {
  const uint64_t before = preemptions_;
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence* const sequence = running_[i].get();
    const int64_t missing = blocks_for(sequence->length()) - std::ssize(sequence->blocks);
    if (missing <= 0) continue;
    bool present = true;
    while (present && !allocate(missing, *sequence)) {
      present = running_.back().get() != sequence;
      preempt_youngest();
    }
  }
  return preemptions_ != before;
}

// Blocks for all tokens of a waiting sequence, those with the beginning of them first. False: not
// enough.
bool Scheduler::take_blocks(Sequence& s) {
  const std::span<const int32_t> tokens(s.tokens);
  if (s.reuse_prefix) pool_.reuse(s.salt, tokens.first(tokens.size() - 1), s.blocks);
  const int64_t known = std::ssize(s.blocks);
  const int64_t missing = blocks_for(s.length()) - known;
  // Some blocks stay free for those that already run and will need more, lest it be thrown out at
  // once.
  const int64_t growing = std::count_if(running_.begin(), running_.end(), [&](const auto& r) {
    return blocks_for(int64_t{r->prompt_count} + r->max_outputs - 1) > std::ssize(r->blocks);
  });
  const int64_t reserve = std::min(growing, options_.blocks / 64 + 1);
  if (missing + reserve > pool_.free() || !allocate(missing, s)) {
    pool_.release(s.blocks);
    return false;
  }
  s.computed = static_cast<int32_t>(known * options_.block_size);
  s.published = static_cast<int32_t>(known);
  s.followed = 0;
  if (has_draft_model()) {
    const auto hole = std::find_if(s.blocks.begin(), s.blocks.begin() + known, [&](int32_t block) {
      return !block_followed_[static_cast<size_t>(block)];
    });
    s.followed = static_cast<int32_t>((hole - s.blocks.begin()) * options_.block_size);
  }
  s.place = known > 0 ? pool_.place(s.blocks[static_cast<size_t>(known - 1)])
                      : PrefixIndex::root(s.salt);
  if (!s.begun) {
    s.begun = true;
    s.queue_ns = now_ns() - s.submitted_ns;
    turn_ = std::max(turn_, s.turn);
    s.cached_tokens = std::min(s.computed, s.prompt_count);
    cached_tokens_ += static_cast<uint64_t>(s.cached_tokens);
  }
  return true;
}

// What is left to a prompt of the step's share for prompts.
int64_t Scheduler::share_of(const Sequence& prompt) const {
  if (decodes_ == 0 || prompt.submitted_ns <= first_begun_ns_) return INT64_MAX;
  return std::max<int64_t>(0, pace_.budget(decodes_) - prompt_tokens_);
}

// Tokens of the next piece of a prompt, at most `share`, at least 1; takes the rows that it needs.
int32_t Scheduler::take_piece(Sequence& s, int64_t share) {
  int64_t count = std::min<int64_t>(share, s.length() - s.computed);
  if (!s.to_score()) {
    if (s.computed + count == s.length()) --rows_left_;
  } else if (s.computed < s.scored) {  // computed again
    count = std::min<int64_t>(count, s.scored - s.computed);
  } else {
    count = std::min(count, rows_left_);
    rows_left_ -= count;
  }
  return static_cast<int32_t>(count);
}

void Scheduler::age() {
  const int64_t now = now_ns();
  if (options_.ageing_ns <= 0 || now < aged_ns_ + options_.ageing_ns / 8) return;
  aged_ns_ = now;
  bool any = false;
  for (const auto& s : waiting_) {
    if (s->begun) continue;
    const int64_t gained = (now - s->submitted_ns) / options_.ageing_ns;
    const auto level = static_cast<int32_t>(std::max<int64_t>(1, s->priority - gained));
    any |= level != s->level;
    s->level = level;
  }
  if (any) std::stable_sort(waiting_.begin(), waiting_.end(), comes_before);
}

// Waiting sequences that begin in this step.
void Scheduler::admit(int64_t prefills, int64_t budget) {
  while (!waiting_.empty() && running() < options_.max_batch &&
         prefills < options_.max_prefill_batch) {
    Sequence& next = *waiting_.front();
    const int64_t share = std::min(budget, share_of(next));
    if (share <= 0 || rows_left_ <= 0 || !take_blocks(next)) return;
    next.planned = take_piece(next, share);
    budget -= next.planned;
    prompt_tokens_ += next.planned;
    ++prefills;
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

bool Scheduler::plan(StepPlanWriter& writer, DraftOrderWriter& order) {
  observe_step();
  const bool crowded = make_room();
  decodes_ = prompt_tokens_ = draft_tokens_ = 0;
  first_begun_ns_ = INT64_MAX;
  for (const auto& s : running_) {
    s->draft.clear();
    if (s->computed != s->length() - 1) continue;
    s->planned = 1;
    ++decodes_;
    if (s->first_token_ns > 0) first_begun_ns_ = std::min(first_begun_ns_, s->first_token_ns);
  }
  follows_ = has_draft_model() && decodes_ <= options_.draft_batch &&
             draft_pace_.pays(std::max<int64_t>(1, decodes_));
  follow_left_ = options_.draft_model_tokens;
  catch_up_left_ = std::min(kCatchUp, follow_left_);
  int64_t budget =
      std::min(options_.max_prefill_tokens, options_.max_step_tokens - decodes_);
  rows_left_ = options_.max_step_rows - decodes_;
  int64_t prefills = 0;
  for (const auto& s : running_) {
    if (s->planned > 0) continue;
    const int64_t share = std::min(budget, share_of(*s));
    if (share <= 0 || rows_left_ <= 0 || prefills >= options_.max_prefill_batch) continue;
    s->planned = take_piece(*s, share);
    budget -= s->planned;
    prompt_tokens_ += s->planned;
    ++prefills;
  }
  age();
  if (!crowded) admit(prefills, budget);
  draft();

  rows_.clear();
  int32_t planned = 0;
  for (const auto& s : running_) {
    s->following = s->guessed_until = 0;
    if (s->planned == 0) continue;
    write(writer, *s);
    if (follows_) follow(*s, planned, order);
    ++planned;
  }
  return planned > 0;
}

// Guesses for the sequences that decode, where the step has room for them.
void Scheduler::draft() {
  if (decodes_ == 0 || decodes_ > options_.draft_batch || (has_draft_model() && !follows_)) return;
  int64_t room = std::min(options_.max_step_tokens - decodes_ - prompt_tokens_, rows_left_);
  for (const auto& s : running_) {
    if (s->planned != 1 || s->computed != s->length() - 1 || s->outputs() == 0) continue;
    const int64_t most = std::min<int64_t>({s->draft_limit, s->max_outputs - s->outputs() - 1, room});
    if (most <= 0) continue;
    const int64_t behind = s->length() - s->followed;
    if (!has_draft_model()) {
      draft_by_lookup(s->tokens, options_.lookup, most, s->draft);
    } else if (behind <= catch_up_left_) {
      s->draft.assign(static_cast<size_t>(most), 0);  // take_guesses()
    }
    const int64_t missing =
        blocks_for(s->length() + std::ssize(s->draft)) - std::ssize(s->blocks);
    if (missing > 0 && (missing * 4 > pool_.free() || !allocate(missing, *s)))
      s->draft.resize(static_cast<size_t>(
          std::ssize(s->blocks) * options_.block_size - s->length()));
    const int64_t count = std::ssize(s->draft);
    if (count == 0) continue;
    s->planned += static_cast<int32_t>(count);
    room -= count;
    draft_tokens_ += count;
    if (has_draft_model()) catch_up_left_ -= behind, follow_left_ -= behind;
    ++drafts_.drafts;
  }
  drafts_.tokens += static_cast<uint64_t>(draft_tokens_);
}

// What the draft model computes of a sequence that is `index` in the plan.
void Scheduler::follow(Sequence& s, int32_t index, DraftOrderWriter& order) {
  const auto guesses = static_cast<int32_t>(s.draft.size());
  const int32_t known = s.computed + s.planned - guesses;
  int64_t count = known - s.followed;
  if (guesses == 0) {
    const bool decodes = s.planned == 1 && known == s.length();
    const int64_t most = decodes ? catch_up_left_ : std::max<int64_t>(s.planned, kCatchUp);
    count = std::min({count, follow_left_, most});
    if (count <= 0) return;
    follow_left_ -= count;
    if (decodes) catch_up_left_ -= count;
  }
  s.following = static_cast<int32_t>(count);
  s.guessed_until = s.followed + s.following + std::max(0, guesses - 1);
  const auto tokens = std::span<const int32_t>(s.tokens)
                          .subspan(static_cast<size_t>(s.followed), static_cast<size_t>(count));
  order.add(tokens, s.followed + s.following, s.blocks, static_cast<int32_t>(options_.block_size),
            index, guesses);
}

// What the last step tells of drafts, now that its guesses have been looked at.
void Scheduler::observe_step() {
  if (has_draft_model() && step_ns_ > 0 && decodes_ > 0 && prompt_tokens_ == 0 &&
      decodes_ <= options_.draft_batch) {
    const auto accepted = static_cast<int64_t>(drafts_.accepted - accepted_before_);
    // A step that only lets the draft model catch up is neither way.
    if (!follows_ || draft_tokens_ > 0)
      draft_pace_.observe(decodes_, draft_tokens_ > 0, decodes_ + accepted, step_ns_);
  }
  accepted_before_ = drafts_.accepted;
  step_ns_ = 0;
}

// The blocks that the draft model has filled since it had computed `before` tokens.
void Scheduler::note_followed(Sequence& s, int32_t before) {
  const auto size = options_.block_size;
  for (int64_t block = before / size; (block + 1) * size <= s.followed; ++block)
    block_followed_[static_cast<size_t>(s.blocks[static_cast<size_t>(block)])] = true;
}

void Scheduler::take_guesses(std::span<const int32_t> guesses) {
  if (!has_draft_model()) return;
  for (const PlannedRows& rows : rows_) {
    std::vector<int32_t>& draft = rows.sequence->draft;
    PHALANX_CHECK(draft.size() <= guesses.size());
    std::copy_n(guesses.begin(), draft.size(), draft.begin());
    guesses = guesses.subspan(draft.size());
  }
}

void Scheduler::accept_draft(Sequence& s, int32_t place) {
  ++s.computed;
  if (has_draft_model()) {
    const int32_t before = s.followed;
    s.followed = std::max(s.followed, std::min(s.computed, s.guessed_until));
    note_followed(s, before);
  }
  ++drafts_.accepted;
  ++drafts_.accepted_by_place[static_cast<size_t>(place)];
}

void Scheduler::write(StepPlanWriter& writer, Sequence& s) {
  const int32_t context = s.computed + s.planned;
  if (!s.draft.empty()) {
    drafted_.assign({s.tokens.back()});
    drafted_.insert(drafted_.end(), s.draft.begin(), s.draft.end());
    writer.add_scored_sequence(drafted_, context, s.blocks,
                               static_cast<int32_t>(options_.block_size), s.tag, s.adapter);
    rows_.push_back({&s, s.computed, s.planned});
    return;
  }
  const auto tokens = std::span<const int32_t>(s.tokens)
                          .subspan(static_cast<size_t>(s.computed), static_cast<size_t>(s.planned));
  const auto block_size = static_cast<int32_t>(options_.block_size);
  if (s.to_score() && s.computed >= s.scored) {
    writer.add_scored_sequence(tokens, context, s.blocks, block_size, s.tag, s.adapter);
    rows_.push_back({&s, s.computed, s.planned});
    return;
  }
  const bool sample = context == s.length();
  writer.add_sequence(tokens, context, s.blocks, block_size, sample, s.tag, s.adapter);
  if (sample) rows_.push_back({&s, context - 1, 1});
}

// The blocks that its computed tokens fill.
void Scheduler::publish(Sequence& s) {
  const std::span<const int32_t> tokens(s.tokens);
  const auto size = static_cast<size_t>(options_.block_size);
  for (; (s.published + 1) * options_.block_size <= s.computed; ++s.published) {
    const auto block = static_cast<size_t>(s.published);
    s.place = pool_.publish(s.place, tokens.subspan(block * size, size), s.blocks[block]);
  }
}

void Scheduler::advance(int64_t ns) {
  if (ns > 0) pace_.observe(decodes_ + draft_tokens_, prompt_tokens_, ns);
  step_ns_ = ns;
  for (const auto& s : running_) {
    s->computed += s->planned - static_cast<int32_t>(s->draft.size());
    s->followed += s->following;
    if (s->following > 0) note_followed(*s, s->followed - s->following);
    s->planned = 0;
    if (pool_.shares_prefixes()) publish(*s);
  }
}

void Scheduler::restart(int64_t blocks) {
  pool_ = BlockPool({.blocks = blocks,
                     .block_size = options_.block_size,
                     .share_prefixes = options_.share_prefixes});
  options_.blocks = blocks;
  block_followed_.assign(has_draft_model() ? static_cast<size_t>(blocks) : 0, false);
  step_ns_ = 0;
  rows_.clear();
  while (!running_.empty()) {
    std::unique_ptr<Sequence> sequence = std::move(running_.back());
    running_.pop_back();
    sequence->blocks.clear();
    sequence->computed = sequence->planned = sequence->published = sequence->followed = 0;
    sequence->place = 0;
    sequence->draft.clear();
    waiting_.push_front(std::move(sequence));
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
