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

// residual += delta if delta is not nullptr; out = rms_norm(residual) if out is not nullptr.
void add_norm(Context& ctx, const MatrixView& residual, const MatrixView* delta,
              const float* weight, float eps, const float* bias, const MatrixView* out);

void rope_and_store(Context& ctx, const MatrixView& qkv, int64_t q_heads, const RopeTable& rope,
                    std::span<const int32_t> positions, std::span<const int32_t> slots,
                    const KvLayer& kv);
void attention(Context& ctx, const MatrixView& qkv, std::span<const SequenceSlice> sequences,
               const AttentionShape& shape, const KvLayer& kv, const MatrixView& out);

}  // namespace phalanx::ops::cpu
