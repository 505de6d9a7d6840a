#pragma once

// Products with float weights, piece by piece, for the drivers of whole layers and of groups.

#include "phalanx/ops/cpu/kernels.h"
#include "phalanx/ops/scratch.h"

namespace phalanx::ops::cpu {

// The inputs of tokens as the kernels of a weight want them: bf16 in pairs, or f32.
struct FloatInputs {
  const std::byte* x = nullptr;
  int64_t stride = 0;  // elements
  bool pairs = false;

  [[nodiscard]] int64_t element_bytes() const { return pairs ? 2 : 4; }
};

// The rows of x, widened into the scratch by all threads where the kernels do not take them as they
// are.
[[nodiscard]] FloatInputs float_inputs(Context& ctx, const MatrixView& x, const PackedLinear& w);

// Some panels by some tokens.
struct FloatItem {
  const PackedLinear& w;
  const FloatInputs& inputs;
  tensor::Range tokens;    // of the inputs
  int64_t all_tokens = 0;  // that the layer multiplies: how often its weights pass by
  int64_t panel_bytes = 0;
  tensor::Range panels;
  const std::byte* next = nullptr;  // panels that will be read next
  int64_t sum_stride = 0;           // of the rows of the result
};
// f32 [tokens][sum_stride], in thread.sums.
void multiply_float(const Kernels& kernels, const FloatItem& item, const ThreadScratch& thread);

}  // namespace phalanx::ops::cpu
