#pragma once

// The operations of ops.h written as plainly as possible, one element after the other: the oracle
// of the tests and the path of machines without AVX2. Arguments as in ops.h, already checked.

#include <cstdint>
#include <span>

#include "phalanx/ops/ops.h"

namespace phalanx::ops::ref {

// exp in f32 by one fixed sequence of operations (range reduction by ln 2 in two parts, Cephes
// expf's polynomial), which all paths share. 0 below -87.33, infinity above 88.37.
[[nodiscard]] float exp32(float x);
[[nodiscard]] float silu(float x);

// acc + w1 * x1, then + w0 * x0, each fused; subnormal inputs and results are zeros: vdpbf16ps bit
// for bit (Intel SDM, "VDPBF16PS"; also checked against the instruction by the tests).
[[nodiscard]] float dot_pair(float acc, float w0, float w1, float x0, float x1);

// acc + what one TDPBF16PS adds to an element, from 16 pairs: the even and the odd products each
// summed up by fused operations, k ascending, then even + odd; subnormal inputs and results are zeros
// (Intel SDM, "TDPBF16PS").
[[nodiscard]] float dot_tile(float acc, const float* w, const float* x);

// Whether bf16 products but those of linear layers with bf16 weights (attention, codes) are sums of
// pairs.
[[nodiscard]] constexpr bool sums_pairs(NumericClass c) { return c != NumericClass::kFma32; }

void linear(const MatrixView& x, const PackedLinear& w, const float* bias, const MatrixView& out,
            NumericClass numeric_class);
void gated_linear(const MatrixView& x, const PackedGated& w, const float* gate_bias,
                  const float* up_bias, const MatrixView& out, NumericClass numeric_class);
// The same for weights that are not float (quantised.h).
void linear_quantised(const MatrixView& x, const PackedLinear& w, const float* bias,
                      const MatrixView& out, NumericClass numeric_class);
void gated_quantised(const MatrixView& x, const PackedGated& w, const float* gate_bias,
                     const float* up_bias, const MatrixView& out, NumericClass numeric_class);

void rms_norm(const MatrixView& x, const float* weight, float eps, const float* bias,
              const MatrixView& out);
void add(const MatrixView& residual, const MatrixView& delta);

void rope_and_store(const MatrixView& qkv, int64_t q_heads, const RopeTable& rope,
                    std::span<const int32_t> positions, std::span<const int32_t> slots,
                    const KvLayer& kv);
void attention(const MatrixView& qkv, std::span<const SequenceSlice> sequences,
               const AttentionShape& shape, const KvLayer& kv, const MatrixView& out,
               NumericClass numeric_class);

}  // namespace phalanx::ops::ref
