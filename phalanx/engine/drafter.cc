#include "phalanx/engine/drafter.h"

#include <algorithm>
#include <array>
#include <limits>

#include "phalanx/base/check.h"
#include "phalanx/base/error.h"

namespace phalanx::engine {

namespace {

// The lowest id among the greatest; 0 if nothing is a number. Lanes, for the compiler's sake.
int32_t likeliest(std::span<const float> row) {
  constexpr size_t kLanes = 16;
  std::array<float, kLanes> most;
  most.fill(-std::numeric_limits<float>::infinity());
  size_t i = 0;
  for (; i + kLanes <= row.size(); i += kLanes)
    for (size_t l = 0; l < kLanes; ++l) most[l] = row[i + l] > most[l] ? row[i + l] : most[l];
  for (; i < row.size(); ++i) most[0] = row[i] > most[0] ? row[i] : most[0];
  const auto found = std::find(row.begin(), row.end(), *std::max_element(most.begin(), most.end()));
  return static_cast<int32_t>(found == row.end() ? 0 : found - row.begin());
}

}  // namespace

Drafter::Drafter(models::Model& model, const StepLimits& limits)
    : model_(model),
      limits_(limits),
      logits_memory_(logits_bytes(limits.draft_sequences, limits.vocab_size),
                     "the draft model's logits"),
      logits_(reinterpret_cast<float*>(logits_memory_.data()),
              static_cast<size_t>(limits.draft_sequences * limits.vocab_size)) {
  PHALANX_CHECK(limits.draft_sequences > 0 && model.info().vocab_size == limits.vocab_size);
}

int64_t Drafter::logits_bytes(int64_t draft_sequences, int64_t vocab_size) {
  return draft_sequences * vocab_size * static_cast<int64_t>(sizeof(float));
}

void Drafter::run(std::span<const std::byte> order, const StepPlanView& view,
                  std::span<std::byte> plan, std::span<int32_t> guesses) {
  buffer_.assign(order.begin(), order.end());
  order_.decode(buffer_, view, limits_);
  // The view looks into `plan`; its tokens are changed there.
  const auto* first = reinterpret_cast<const std::byte*>(view.inputs().tokens.data());
  PHALANX_CHECK(first >= plan.data() && first < plan.data() + plan.size());
  const std::span<int32_t> tokens(
      reinterpret_cast<int32_t*>(plan.data() + (first - plan.data())), view.inputs().tokens.size());

  guessing_.clear();
  size_t out = 0;
  for (const DraftWant& want : order_.wants()) {
    const PlannedSequence& s = view.sequences()[static_cast<size_t>(want.sequence)];
    guessing_.push_back({.slice = static_cast<size_t>(want.sequence),
                         .place = s.token_begin + s.token_count - want.count,
                         .left = want.count,
                         .out = out});
    out += static_cast<size_t>(want.count);
  }
  if (out > guesses.size())
    throw Error(Code::kDataLoss, "draft order: more guesses are wanted than a step has rows");
  model_.forward(order_.inputs(), logits_.data());
  take(tokens, guesses);
  while (!guessing_.empty()) {
    tokens_.clear(), positions_.clear(), slots_.clear(), rows_.clear(), slices_.clear();
    for (const Guessing& g : guessing_) {
      const auto newest = static_cast<size_t>(g.place) - 1;
      const auto at = static_cast<int32_t>(tokens_.size());
      const int32_t position = view.inputs().positions[newest];
      tokens_.push_back(tokens[newest]);
      positions_.push_back(position);
      slots_.push_back(view.inputs().slots[newest]);
      rows_.push_back(at);
      slices_.push_back({.token_begin = at,
                         .token_count = 1,
                         .context = position + 1,
                         .block_table = view.inputs().sequences[g.slice].block_table});
    }
    model_.forward({.tokens = tokens_,
                    .positions = positions_,
                    .slots = slots_,
                    .sequences = slices_,
                    .sample_rows = rows_},
                   logits_.data());
    take(tokens, guesses);
  }
}

// One guess for each row of logits; drops the sequences that have all of theirs.
void Drafter::take(std::span<int32_t> tokens, std::span<int32_t> guesses) {
  const auto vocab = static_cast<size_t>(limits_.vocab_size);
  for (size_t row = 0; row < guessing_.size(); ++row) {
    Guessing& g = guessing_[row];
    const int32_t guess = likeliest(logits_.subspan(row * vocab, vocab));
    tokens[static_cast<size_t>(g.place++)] = guess;
    guesses[g.out++] = guess;
    --g.left;
  }
  std::erase_if(guessing_, [](const Guessing& g) { return g.left == 0; });
}

}  // namespace phalanx::engine
