#include "phalanx/engine/sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>

#include "phalanx/base/check.h"
#include "phalanx/engine/philox.h"

namespace phalanx::engine {

namespace {

constexpr int64_t kPiece = 1024;  // ids per sum
constexpr int64_t kGroup = 64;    // ids per stored maximum
constexpr int64_t kSortedAtMost = 256;  // weights sorted to find where top_p ends
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Floats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));

Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
Floats select(Ints mask, Floats yes, Floats no) {
  return std::bit_cast<Floats>((std::bit_cast<Ints>(yes) & mask) |
                               (std::bit_cast<Ints>(no) & ~mask));
}
bool has_penalty(const SamplingParams& p) {
  return p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
}

// Leaves those of 32 logits whose bit is set and takes the others away; whether any is left. Without
// branches, since the bits of a grammar's mask follow no pattern that a processor could guess.
bool keep_allowed(float* logits, uint32_t allowed) {
  constexpr uint32_t kNone = 0xff800000;  // minus infinity
  static constexpr std::array<uint32_t, 32> kBits = [] {
    std::array<uint32_t, 32> bits{};
    for (size_t i = 0; i < bits.size(); ++i) bits[i] = uint32_t{1} << i;
    return bits;
  }();
  if (allowed == ~uint32_t{0}) return true;
  std::array<uint32_t, 32> values;
  std::memcpy(values.data(), logits, sizeof(values));
  uint32_t left = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const uint32_t keep = (allowed & kBits[i]) == kBits[i] ? ~uint32_t{0} : 0;
    left |= keep & (values[i] ^ kNone);
    values[i] = (values[i] & keep) | (kNone & ~keep);
  }
  std::memcpy(logits, values.data(), sizeof(values));
  return left != 0;
}

}  // namespace

// --- TokenCounts -----------------------------------------------------------------------------

TokenCounts::TokenCounts(int64_t vocab_size, int64_t entries)
    : index_(static_cast<size_t>(vocab_size), -1) {
  entries_.reserve(static_cast<size_t>(std::min(entries, vocab_size)));
}

TokenCounts::Entry& TokenCounts::entry(int32_t token) {
  int32_t& index = index_[static_cast<size_t>(token)];
  if (index < 0) {
    index = static_cast<int32_t>(entries_.size());
    entries_.push_back({.token = token});
  }
  return entries_[static_cast<size_t>(index)];
}

// --- Sampler ---------------------------------------------------------------------------------

Sampler::Sampler(int64_t vocab_size)
    : vocab_size_(vocab_size), math_(best_row_math()) {
  const auto size = static_cast<size_t>(vocab_size);
  adjusted_.resize(size);
  weights_.resize(size);
  piece_sums_.resize((size + kPiece - 1) / kPiece);
  group_max_.resize((size + kGroup - 1) / kGroup);
  group_order_.resize(group_max_.size());
  candidates_.reserve(size);
}

SampleResult Sampler::sample(std::span<const float> logits, const SampleRequest& request,
                             std::vector<TokenLogprob>* top) {
  PHALANX_CHECK(static_cast<int64_t>(logits.size()) == vocab_size_);
  const SamplingParams& params = *request.params;
  SampleResult result;
  double raw_lse = 0;
  if (params.logprobs >= 0) {
    const Maximum raw = scan(logits);
    if (!raw.valid) return result;
    raw_lse = log_sum_exp(logits, raw.value);
    if (top != nullptr) {
      top->clear();
      if (params.logprobs > 0) {
        select_top(logits, std::min<int64_t>(params.logprobs, vocab_size_));
        for (const Candidate& c : candidates_) {
          top->push_back({c.id, static_cast<float>(static_cast<double>(c.value) - raw_lse)});
        }
      }
    }
  }
  std::span<const float> row;
  try {
    row = adjust(logits, request);
  } catch (const Error& error) {
    result.error = error.what();
    return result;
  }
  const Maximum max = scan(row);
  if (!max.valid) {
    if (params.guide && scan(logits).valid)
      result.error = "the structure that was asked for allows no further token";
    return result;
  }
  result.valid = true;
  result.token = max.id;
  if (params.temperature >= 1e-5f && params.top_k != 1) {
    const double uniform = uniform_draw(request.seed, 0, request.position, 0);
    if (params.top_k > 0 && params.top_k < vocab_size_) {
      select_top(row, params.top_k);
      result.token = draw_from_candidates(params, max.value, uniform);
    } else {
      result.token = draw_from_row(row, params, max.value, uniform);
    }
  }
  if (params.logprobs >= 0) {
    result.logprob = static_cast<float>(
        static_cast<double>(logits[static_cast<size_t>(result.token)]) - raw_lse);
  }
  return result;
}

bool Sampler::score(std::span<const float> logits, int32_t token, int32_t count,
                    PromptLogprob* out) {
  PHALANX_CHECK(static_cast<int64_t>(logits.size()) == vocab_size_);
  const Maximum max = scan(logits);
  if (!max.valid) return false;
  const double lse = log_sum_exp(logits, max.value);
  const float own = logits[static_cast<size_t>(token)];
  const auto logprob = [&](float logit) {
    return static_cast<float>(static_cast<double>(logit) - lse);
  };
  out->token = token;
  out->logprob = logprob(own);
  const auto before = logits.begin() + token;
  out->rank = static_cast<int32_t>(
      1 + std::count_if(logits.begin(), before, [&](float l) { return l >= own; }) +
      std::count_if(before + 1, logits.end(), [&](float l) { return l > own; }));
  if (count == 0) return true;
  select_top(logits, std::min<int64_t>(count, vocab_size_));
  for (const Candidate& c : candidates_) out->top.push_back({c.id, logprob(c.value)});
  return true;
}

std::span<const float> Sampler::adjust(std::span<const float> logits,
                                       const SampleRequest& request) {
  const SamplingParams& params = *request.params;
  const bool penalty = has_penalty(params);
  const bool mask = request.outputs < params.min_tokens && !params.stop_token_ids.empty();
  const std::span<const uint32_t> allowed =
      params.guide ? params.guide->allowed() : std::span<const uint32_t>();
  if (!penalty && !mask && params.logit_bias.empty() && allowed.empty()) return logits;
  std::copy(logits.begin(), logits.end(), adjusted_.begin());
  if (penalty) {
    PHALANX_CHECK(request.counts != nullptr);
    for (const TokenCounts::Entry& e : request.counts->entries()) {
      float& l = adjusted_[static_cast<size_t>(e.token)];
      l = l > 0 ? l / params.repetition_penalty : l * params.repetition_penalty;
      if (e.outputs > 0) {
        l -= params.frequency_penalty * static_cast<float>(e.outputs);
        l -= params.presence_penalty;
      }
    }
  }
  for (const auto& [id, bias] : params.logit_bias) {
    if (id >= 0 && id < vocab_size_) adjusted_[static_cast<size_t>(id)] += bias;
  }
  if (mask) {
    for (const int32_t id : params.stop_token_ids) {
      if (id >= 0 && id < vocab_size_) adjusted_[static_cast<size_t>(id)] = -kInfinity;
    }
  }
  if (!allowed.empty()) apply_guide(allowed, request);
  return adjusted_;
}

void Sampler::apply_guide(std::span<const uint32_t> allowed, const SampleRequest& request) {
  const auto covered = std::min<int64_t>(vocab_size_, std::ssize(allowed) * 32);
  const int64_t whole = covered / 32 * 32;
  bool any = false;
  for (int64_t begin = 0; begin < whole; begin += 32)
    any |= keep_allowed(adjusted_.data() + begin, allowed[static_cast<size_t>(begin / 32)]);
  for (int64_t i = whole; i < covered; ++i) {
    float& l = adjusted_[static_cast<size_t>(i)];
    if ((allowed[static_cast<size_t>(i / 32)] >> (i % 32) & 1) == 0) l = -kInfinity;
    any |= l != -kInfinity;
  }
  std::fill(adjusted_.begin() + covered, adjusted_.end(), -kInfinity);
  if (any) return;
  // min_tokens has taken the stop ids, but nothing else may come.
  for (const int32_t id : request.params->stop_token_ids) {
    if (id < 0 || id >= covered) continue;
    if ((allowed[static_cast<size_t>(id / 32)] >> (id % 32) & 1) != 0)
      adjusted_[static_cast<size_t>(id)] = 0;
  }
}

Sampler::Maximum Sampler::scan(std::span<const float> row) {
  Ints bad = {};
  bool bad_tail = false;
  for (int64_t begin = 0; begin < vocab_size_; begin += kGroup) {
    const float* x = row.data() + begin;
    float& best = group_max_[static_cast<size_t>(begin / kGroup)];
    best = -kInfinity;
    if (begin + kGroup <= vocab_size_) {
      Floats m[4];
      for (int lane = 0; lane < 4; ++lane) m[lane] = load(x + 4 * lane);
      for (int lane = 0; lane < 4; ++lane) bad |= m[lane] != m[lane];
      for (int i = 16; i < kGroup; i += 16) {
        for (int lane = 0; lane < 4; ++lane) {
          const Floats v = load(x + i + 4 * lane);
          bad |= v != v;
          m[lane] = select(v > m[lane], v, m[lane]);
        }
      }
      m[0] = select(m[1] > m[0], m[1], m[0]);
      m[2] = select(m[3] > m[2], m[3], m[2]);
      m[0] = select(m[2] > m[0], m[2], m[0]);
      for (int i = 0; i < 4; ++i) best = std::max(best, m[0][i]);
    } else {
      for (int64_t i = 0; i < vocab_size_ - begin; ++i) {
        bad_tail |= std::isnan(x[i]);
        best = std::max(best, x[i]);
      }
    }
  }
  Maximum max;
  if (bad_tail || (bad[0] | bad[1] | bad[2] | bad[3]) != 0) return max;
  size_t group = 0;
  for (size_t g = 1; g < group_max_.size(); ++g) {
    if (group_max_[g] > group_max_[group]) group = g;
  }
  max.value = group_max_[group];
  if (!std::isfinite(max.value)) return max;
  int64_t id = static_cast<int64_t>(group) * kGroup;
  while (row[static_cast<size_t>(id)] != max.value) ++id;
  max.id = static_cast<int32_t>(id);
  max.valid = true;
  return max;
}

// The k highest of the row that was scanned last, best first, into candidates_. The k-th highest
// maximum of a group is a lower bound of the k-th highest value, so most groups are never looked at.
void Sampler::select_top(std::span<const float> row, int64_t k) {
  float bound = -kInfinity;
  if (k < static_cast<int64_t>(group_max_.size())) {
    std::copy(group_max_.begin(), group_max_.end(), group_order_.begin());
    std::nth_element(group_order_.begin(), group_order_.begin() + (k - 1), group_order_.end(),
                     std::greater<>());
    bound = group_order_[static_cast<size_t>(k - 1)];
  }
  candidates_.clear();
  for (size_t g = 0; g < group_max_.size(); ++g) {
    if (group_max_[g] < bound) continue;
    const auto begin = static_cast<int64_t>(g) * kGroup;
    const int64_t end = std::min(begin + kGroup, vocab_size_);
    for (int64_t i = begin; i < end; ++i) {
      const float value = row[static_cast<size_t>(i)];
      if (value >= bound) candidates_.push_back({value, static_cast<int32_t>(i)});
    }
  }
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.value != b.value ? a.value > b.value : a.id < b.id;
  };
  const auto middle = candidates_.begin() + std::min<int64_t>(k, std::ssize(candidates_));
  std::partial_sort(candidates_.begin(), middle, candidates_.end(), better);
  candidates_.erase(middle, candidates_.end());
}

int32_t Sampler::draw_from_candidates(const SamplingParams& params, float max, double uniform) {
  const float scale = 1.0f / params.temperature;
  double total = 0;
  size_t kept = 0;
  for (Candidate& c : candidates_) {
    c.value = portable_exp((c.value - max) * scale);
    if (kept > 0 && (c.value < params.min_p || c.value == 0)) break;
    total += static_cast<double>(c.value);
    ++kept;
  }
  if (params.top_p < 1.0f) {
    const double wanted = static_cast<double>(params.top_p) * total;
    double sum = 0;
    size_t n = 0;
    while (n < kept && (n == 0 || sum < wanted)) sum += static_cast<double>(candidates_[n++].value);
    kept = n;
    total = sum;
  }
  const double target = uniform * total;
  double sum = 0;
  for (size_t i = 0; i < kept; ++i) {
    sum += static_cast<double>(candidates_[i].value);
    if (sum > target) return candidates_[i].id;
  }
  return candidates_[kept - 1].id;
}

// Calls visit(first id, ids, the piece's sum) for every piece, in ascending order.
template <typename Visit>
void Sampler::for_pieces(Visit&& visit) {
  for (size_t p = 0; p < piece_sums_.size(); ++p) {
    const auto begin = static_cast<int64_t>(p) * kPiece;
    visit(begin, std::min(kPiece, vocab_size_ - begin), piece_sums_[p]);
  }
}

int32_t Sampler::draw_from_row(std::span<const float> row, const SamplingParams& params, float max,
                               double uniform) {
  const float scale = 1.0f / params.temperature;
  for_pieces([&](int64_t begin, int64_t size, double& sum) {
    sum = math_.weigh(row.data() + begin, size, max, scale, params.min_p,
                      weights_.data() + begin);
  });
  double total = std::accumulate(piece_sums_.begin(), piece_sums_.end(), 0.0);
  if (params.top_p < 1.0f) {
    keep_top_p(static_cast<double>(params.top_p), total);
    total = std::accumulate(piece_sums_.begin(), piece_sums_.end(), 0.0);
  }
  const double target = uniform * total;
  double before = 0;
  int32_t last = 0;
  for (size_t p = 0; p < piece_sums_.size(); ++p) {
    if (before + piece_sums_[p] <= target && p + 1 < piece_sums_.size()) {
      before += piece_sums_[p];
      continue;
    }
    const auto begin = static_cast<int64_t>(p) * kPiece;
    const int64_t end = std::min(begin + kPiece, vocab_size_);
    bool any = false;
    double sum = before;
    for (int64_t i = begin; i < end; ++i) {
      const float w = weights_[static_cast<size_t>(i)];
      if (w == 0) continue;
      any = true;
      last = static_cast<int32_t>(i);
      sum += static_cast<double>(w);
      if (sum > target) return last;
    }
    // The piece's sum and this one round differently: the last id of the piece takes the rest.
    if (any) return last;
    before += piece_sums_[p];
  }
  for (int64_t i = vocab_size_; i-- > 0;) {
    if (weights_[static_cast<size_t>(i)] > 0) return static_cast<int32_t>(i);
  }
  return last;
}

// Finds the shortest run of the heaviest weights that reaches top_p * total, zeroes the others and
// renews piece_sums_. The weight where the run ends is enclosed by halving, on the bits of the
// float, until few weights are left between the bounds; only those are sorted.
void Sampler::keep_top_p(double top_p, double total) {
  const double wanted = top_p * total;
  // mass(>= low) >= wanted > mass(>= high), in the same order of additions as `total`.
  uint32_t low = 0, high = std::bit_cast<uint32_t>(1.0f) + 2;
  int64_t low_count = vocab_size_, high_count = 0;
  double high_mass = 0;
  uint32_t middle = std::bit_cast<uint32_t>(0x1p-8f);
  while (high - low > 1 && low_count - high_count > kSortedAtMost) {
    double mass = 0;
    int64_t count = 0;
    const auto least = std::bit_cast<float>(middle);
    for_pieces([&](int64_t begin, int64_t size, double&) {
      mass += math_.mass(weights_.data() + begin, size, least, &count);
    });
    if (mass >= wanted) {
      low = middle;
      low_count = count;
    } else {
      high = middle;
      high_count = count;
      high_mass = mass;
    }
    middle = low + (high - low) / 2;
  }
  const auto least = std::bit_cast<float>(low);
  const auto above = std::bit_cast<float>(high);
  candidates_.clear();
  for (int64_t i = 0; i < vocab_size_; ++i) {
    const float w = weights_[static_cast<size_t>(i)];
    if (w >= least && w < above && w > 0) candidates_.push_back({w, static_cast<int32_t>(i)});
  }
  std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& a, const Candidate& b) {
    return a.value != b.value ? a.value > b.value : a.id < b.id;
  });
  // The heaviest always stays.
  size_t kept = 0;
  for (double sum = high_mass; kept < candidates_.size() &&
                               (sum < wanted || (kept == 0 && high_count == 0));
       ++kept) {
    sum += static_cast<double>(candidates_[kept].value);
  }
  for (; kept < candidates_.size(); ++kept) {
    weights_[static_cast<size_t>(candidates_[kept].id)] = 0;
  }
  for_pieces([&](int64_t begin, int64_t size, double& sum) {
    float* const w = weights_.data() + begin;
    for (int64_t i = 0; i < size; ++i) w[i] = w[i] < least ? 0.0f : w[i];
    int64_t count = 0;
    sum = math_.mass(w, size, 0.0f, &count);
  });
}

}  // namespace phalanx::engine
