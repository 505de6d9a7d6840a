#pragma once

// The operations of ops.h over the kernels of a path (Context::Scratch::kernels). Arguments as in
// ops.h, already checked.

#include <cstdint>
#include <span>

#include "phalanx/ops/ops.h"

namespace phalanx::ops::cpu {

struct Kernels;
struct IntegerKernels;
// nullptr for the reference. The machine must have `isa`.
[[nodiscard]] const Kernels* kernels_of(Isa isa);
[[nodiscard]] const IntegerKernels* integer_kernels_of(Isa isa);

void linear(Context& ctx, const MatrixView& x, const PackedLinear& w, const float* bias,
            const MatrixView& out);
void gated_linear(Context& ctx, const MatrixView& x, const PackedGated& w, const float* gate_bias,
                  const float* up_bias, const MatrixView& out);
// Weights that are not float (quantised.h).
void linear_quantised(Context& ctx, const MatrixView& x, const PackedLinear& w, const float* bias,
                      const MatrixView& out);
void gated_quantised(Context& ctx, const MatrixView& x, const PackedGated& w,
                     const float* gate_bias, const float* up_bias, const MatrixView& out);

// One layer of a group, and its rows of x and out.
struct GroupedLinear {
  const PackedLinear* w = nullptr;  // of a gated layer its panels
  int64_t outputs = 0;
  const float* bias = nullptr;
  const float* up_bias = nullptr;
  tensor::Range rows;
};
// Layers that are not cut into parts, with adjacent runs of rows; of quantised ones no more than
// kTokenBlock rows each. Every element as linear and gated_linear give it; the weights of all layers
// are handed out together and pass by once.
void linear_grouped(Context& ctx, const MatrixView& x, std::span<const GroupedLinear> layers,
                    bool gated, const MatrixView& out);

// residual += delta if delta is not nullptr; out = rms_norm(residual) if out is not nullptr.
void add_norm(Context& ctx, const MatrixView& residual, const MatrixView* delta,
              const float* weight, float eps, const float* bias, const MatrixView* out);

void rope_and_store(Context& ctx, const MatrixView& qkv, int64_t q_heads, const RopeTable& rope,
                    std::span<const int32_t> positions, std::span<const int32_t> slots,
                    const KvLayer& kv);
void attention(Context& ctx, const MatrixView& qkv, std::span<const SequenceSlice> sequences,
               const AttentionShape& shape, const KvLayer& kv, const MatrixView& out);

}  // namespace phalanx::ops::cpu
