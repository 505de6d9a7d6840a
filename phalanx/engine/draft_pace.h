#pragma once

#include <array>
#include <cstdint>

namespace phalanx::engine {

// Whether drafts of a draft model pay beside so many sequences that decode: a guess costs a step of the
// draft model and a row of the model, which is next to nothing where memory binds and a full share of
// the step where the cores do. Learns the time per token of steps with and without drafts (by powers of
// two of the sequences), takes the better and looks at the other now and then. Results never depend on
// it. One thread.
class DraftPace {
 public:
  [[nodiscard]] bool pays(int64_t decodes) const;
  // A step without prompts took `ns` and gave `tokens`.
  void observe(int64_t decodes, bool drafted, int64_t tokens, int64_t ns);

  static constexpr int kTrials = 4;            // steps that are looked at, at the beginning and later
  static constexpr int kLookPlainEvery = 256;  // while drafts pay, in steps
  // While they do not: to look at drafts the draft model must catch up first.
  static constexpr int kLookDraftedEvery = 1024;

 private:
  struct Way {
    double token_ns = 0;
    int64_t seen = 0;
  };
  struct Batch {
    std::array<Way, 2> ways;  // without and with drafts
    int since_look = 0;       // steps of the better way
    int looks_left = 0;       // steps of the other one
    [[nodiscard]] bool drafts_better() const { return ways[1].token_ns <= ways[0].token_ns; }
  };
  std::array<Batch, 32> batches_{};  // by the bit width of the number of sequences
};

}  // namespace phalanx::engine
