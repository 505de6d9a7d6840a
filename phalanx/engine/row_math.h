#pragma once

#include <cstdint>
#include <span>

namespace phalanx::engine {

// Sums over a row of logits or weights for the sampler. No library exponential (libm chooses by
// CPU), one order of additions (ids i, i + 16, ... in one of 16 float lanes, the lanes added as a
// tree), so the same bits on every machine; the AVX2 form only does the same with wider registers.
struct RowMath {
  // Weights exp((x - max) * scale) of `count` ids, 0 where below `least`, into `out` (may be null);
  // returns their sum. x <= max, scale > 0; x may hold -inf.
  double (*weigh)(const float* x, int64_t count, float max, float scale, float least, float* out);
  // Sum of the weights that are at least `least`; adds their number to *found.
  double (*mass)(const float* weights, int64_t count, float least, int64_t* found);
};
[[nodiscard]] const RowMath& portable_row_math();
// AVX2 where this CPU has it.
[[nodiscard]] const RowMath& best_row_math();

// log(sum(exp(row))), in pieces of 1,024 ids added in ascending order in double. row has no NaN
// and its maximum `max` is finite.
[[nodiscard]] double log_sum_exp(std::span<const float> row, float max);
// Natural logarithm of a positive finite number, to about 1e-15 relative; same bits everywhere.
[[nodiscard]] double portable_log(double x);
// exp for x <= 0 to about 2e-7 relative, 0 below -87; same bits everywhere.
[[nodiscard]] float portable_exp(float x);

}  // namespace phalanx::engine
