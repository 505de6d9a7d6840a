#pragma once

#include <array>
#include <cstdint>

namespace phalanx::engine {

// How many prompt tokens a step may take beside `decodes` sequences that decode, so that the step
// lasts at most `stretch` times as long as it would without them. Learns from the steps' times: of
// those without prompt tokens how long decoding takes (by powers of two of its sequences), of the
// others what a prompt token adds. Results never depend on it, only the cut into steps does.
// One thread.
class PrefillPace {
 public:
  explicit PrefillPace(double stretch) : stretch_(stretch) {}
  // A step with these tokens took `ns`.
  void observe(int64_t decodes, int64_t prompt_tokens, int64_t ns);
  // At least kLeast; no bound without anything that decodes.
  [[nodiscard]] int64_t budget(int64_t decodes) const;

  static constexpr int64_t kLeast = 8;

 private:
  [[nodiscard]] double decode_ns(int64_t decodes) const;  // 0: unknown

  double stretch_;
  std::array<double, 32> decode_ns_{};  // by the bit width of the number of sequences, 0: unknown
  double token_ns_ = 0;                 // 0: unknown
};

}  // namespace phalanx::engine
