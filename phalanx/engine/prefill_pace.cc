#include "phalanx/engine/prefill_pace.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <limits>

namespace phalanx::engine {

namespace {

constexpr double kWeight = 0.2;    // of the newest observation
constexpr double kFirstToken = 32;  // prompt tokens that one more step's time is guessed to buy

size_t bucket_of(int64_t decodes) {
  return std::min<size_t>(std::bit_width(static_cast<uint64_t>(decodes)), 31);
}

// Follows the middle of what it sees rather than the mean: one value moves it by a few percent,
// however far away it is, so stalls of the machine do not pass for the step's own time.
void follow(double& middle, double value, double reach) {
  if (middle == 0) middle = value;
  middle += kWeight * std::clamp(value - middle, -reach * middle, reach * middle);
}

}  // namespace

// The nearest bucket that is known; smaller batches first, whose time is a lower bound.
double PrefillPace::decode_ns(int64_t decodes) const {
  const size_t bucket = bucket_of(decodes);
  for (size_t b = bucket + 1; b-- > 0;)
    if (decode_ns_[b] > 0) return decode_ns_[b];
  for (size_t b = bucket + 1; b < decode_ns_.size(); ++b)
    if (decode_ns_[b] > 0) return decode_ns_[b];
  return 0;
}

void PrefillPace::observe(int64_t decodes, int64_t prompt_tokens, int64_t ns) {
  const auto time = static_cast<double>(ns);
  if (decodes > 0 && prompt_tokens == 0) {
    follow(decode_ns_[bucket_of(decodes)], time, 0.15);
  } else if (prompt_tokens > 0) {
    const double rest = time - (decodes > 0 ? decode_ns(decodes) : 0);
    // Even a step that took no longer than without them says no more than "little".
    const double least = time / static_cast<double>(64 * prompt_tokens);
    follow(token_ns_, std::max(rest / static_cast<double>(prompt_tokens), least), 0.5);
  }
}

int64_t PrefillPace::budget(int64_t decodes) const {
  if (decodes == 0 || stretch_ <= 0) return std::numeric_limits<int64_t>::max();
  const double step = decode_ns(decodes);
  const double tokens = step == 0 || token_ns_ == 0 ? kFirstToken
                                                    : (stretch_ - 1) * step / token_ns_;
  return std::max(kLeast, static_cast<int64_t>(std::min(tokens, 1e9)));
}

}  // namespace phalanx::engine
