#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "phalanx/engine/request.h"
#include "phalanx/engine/row_math.h"

namespace phalanx::engine {

// How often each token occurred in one sequence; what the penalties need. One entry per different
// token; costs 4 bytes per vocabulary entry, so it exists only where a penalty is asked for.
class TokenCounts {
 public:
  struct Entry {
    int32_t token = 0;
    int32_t outputs = 0;  // 0: only in the prompt
  };
  // Room for `entries` different tokens.
  TokenCounts(int64_t vocab_size, int64_t entries);
  void add_prompt(int32_t token) { (void)entry(token); }
  void add_output(int32_t token) { ++entry(token).outputs; }
  [[nodiscard]] std::span<const Entry> entries() const { return entries_; }

 private:
  Entry& entry(int32_t token);
  std::vector<Entry> entries_;
  std::vector<int32_t> index_;  // of the token's entry, -1: none
};

// What one row of logits is sampled with.
struct SampleRequest {
  const SamplingParams* params = nullptr;
  uint64_t seed = 0;
  uint32_t position = 0;                // of the new token in its sequence
  int32_t outputs = 0;                  // tokens generated so far
  const TokenCounts* counts = nullptr;  // needed with a penalty
};

struct SampleResult {
  bool valid = false;  // false: NaN, +inf, or no token with a finite logit
  int32_t token = 0;
  float logprob = 0;  // with params->logprobs >= 0
  std::string error;  // where not valid, what the guide says, if it was the guide
};

// One row of logits to one token, a function of its arguments alone (no state, no library
// exponential), so that batch, order and machine change nothing. In this order, as vLLM:
//
//   l = logit
//   repetition:  token in prompt or output: l = l > 0 ? l / r : l * r
//   frequency:   l -= f * (count in output);  presence: l -= p if in output
//   logit_bias:  l += the id's bias
//   min_tokens:  stop ids get -inf while outputs < min_tokens
//   guide:       ids that may not come get -inf; where only stop ids may, min_tokens gives way
//   temperature: below 1e-5 the highest l wins; else l / temperature
//   min_p:       keeps exp(l - max) >= min_p
//   top_k:       keeps the k highest
//   top_p:       keeps the shortest run of the most probable whose probabilities (of those still
//                kept) reach top_p; never empty
//   draw:        inverse of the distribution function over what is kept, with one Philox draw of
//                (seed, position)
//
// Ties go to the lower id everywhere. Log-probabilities are those of the raw logits' log-softmax,
// before all of the above (vLLM's "raw_logprobs"). Sums run over pieces of 1,024 ids, the pieces
// added in ascending order in double (row_math.h).
// One thread; no allocation after construction unless top log-probabilities are asked for.
class Sampler {
 public:
  explicit Sampler(int64_t vocab_size);
  // logits: [vocab_size]. top: receives the params->logprobs most probable tokens, best first.
  SampleResult sample(std::span<const float> logits, const SampleRequest& request,
                      std::vector<TokenLogprob>* top);
  // What the logits say of `token`, with the `count` most probable ones. False: NaN, +inf, or no token
  // with a finite logit.
  [[nodiscard]] bool score(std::span<const float> logits, int32_t token, int32_t count,
                           PromptLogprob* out);

 private:
  struct Candidate {
    float value = 0;
    int32_t id = 0;
  };
  struct Maximum {
    bool valid = false;
    float value = 0;
    int32_t id = 0;
  };
  // Throws what the guide throws.
  std::span<const float> adjust(std::span<const float> logits, const SampleRequest& request);
  void apply_guide(std::span<const uint32_t> allowed, const SampleRequest& request);
  Maximum scan(std::span<const float> row);
  void select_top(std::span<const float> row, int64_t k);
  int32_t draw_from_candidates(const SamplingParams& params, float max, double uniform);
  int32_t draw_from_row(std::span<const float> row, const SamplingParams& params, float max,
                        double uniform);
  void keep_top_p(double top_p, double total);
  template <typename Visit>
  void for_pieces(Visit&& visit);

  int64_t vocab_size_;
  const RowMath& math_;
  std::vector<float> adjusted_;         // [vocab_size]
  std::vector<float> weights_;          // [vocab_size], exp of the shifted logits
  std::vector<double> piece_sums_;      // of weights_
  std::vector<float> group_max_;        // of the last row scanned, 64 ids each
  std::vector<float> group_order_;
  std::vector<Candidate> candidates_;
};

}  // namespace phalanx::engine
