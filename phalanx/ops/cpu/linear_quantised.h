#pragma once

// Products with quantised weights, piece by piece, for the drivers of whole layers and of groups.

#include "phalanx/ops/scratch.h"

namespace phalanx::ops::cpu {

// The inputs of up to kTokenBlock tokens as the kernels of a weight want them.
struct QuantisedInputs {
  const std::byte* x = nullptr;
  int64_t stride = 0;  // bytes
  bool pairs = false;
  int64_t groups = 0;
  // In the scratch, to be written by prepare_input; nullptr: not needed.
  std::byte* own = nullptr;  // where x is not taken as it is
  float* group_sums = nullptr;
  float* token_scale = nullptr;
  int32_t* token_sum = nullptr;

  [[nodiscard]] bool ready() const { return own == nullptr && group_sums == nullptr; }
};

// Where the rows of x are, or will be: those to be prepared at the places [place, place + x.rows) of
// the scratch.
[[nodiscard]] QuantisedInputs place_inputs(const Context::Scratch& scratch, const MatrixView& x,
                                           const PackedLinear& w, int64_t place);
// Prepares row t of x.
void prepare_input(const Context::Scratch& scratch, const MatrixView& x, const PackedLinear& w,
                   const QuantisedInputs& inputs, int64_t t);

// Some panels by some tokens of prepared inputs.
struct QuantisedItem {
  const PackedLinear& w;
  const QuantisedInputs& inputs;
  int64_t tokens = 0;
  int64_t panel_bytes = 0;
  tensor::Range panels;
  const std::byte* next = nullptr;  // panels that will be read next
  int64_t sum_stride = 0;           // of the rows of the result
};
// Panels that an item with the rows of x may have.
[[nodiscard]] int64_t widest_item(const Context::Scratch& scratch, const MatrixView& x,
                                  const PackedLinear& w);
// f32 [tokens][sum_stride], in memory of the thread.
[[nodiscard]] const float* multiply_quantised(const Context::Scratch& scratch,
                                              const QuantisedItem& item, ThreadScratch& thread);

}  // namespace phalanx::ops::cpu
