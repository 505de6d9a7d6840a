#include "phalanx/ops/ops.h"

#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/packing.h"
#include "phalanx/ops/ref/ref.h"
#include "phalanx/ops/scratch.h"

namespace phalanx::ops {
namespace {

constexpr NumericClass kFma32 = NumericClass::kFma32;

bool on_reference(const Context& ctx) { return ctx.scratch().kernels == nullptr; }

bool is_act(DType dtype) { return dtype == DType::kBF16 || dtype == DType::kF32; }

void check_matrix(const MatrixView& m) {
  PHALANX_CHECK(m.rows >= 0 && m.cols >= 0 && m.stride >= m.cols);
  PHALANX_CHECK(m.rows == 0 || m.cols == 0 || m.data != nullptr);
}

bool is_float(const PackedLinear& w) { return w.storage == quant::Storage::kFloat; }

void check_linear(const MatrixView& x, const PackedLinear& w, int64_t rows, const MatrixView& out) {
  check_matrix(x);
  check_matrix(out);
  PHALANX_CHECK(w.dtype == DType::kBF16 || w.dtype == DType::kF16 || w.dtype == DType::kF32);
  PHALANX_CHECK(x.dtype == (w.dtype == DType::kBF16 ? DType::kBF16 : DType::kF32));
  PHALANX_CHECK(is_act(out.dtype));
  PHALANX_CHECK(x.cols == w.k && out.cols == rows && out.rows == x.rows);
  PHALANX_CHECK(w.rows == 0 || w.data != nullptr);
  PHALANX_CHECK(is_float(w) || w.group > 0);
}

void check_norm(const MatrixView& x, const float* weight, const MatrixView& out) {
  check_matrix(x);
  check_matrix(out);
  PHALANX_CHECK(x.dtype == DType::kF32 && is_act(out.dtype) && weight != nullptr);
  PHALANX_CHECK(x.rows == out.rows && x.cols == out.cols);
}

void check_add(const MatrixView& residual, const MatrixView& delta) {
  check_matrix(residual);
  check_matrix(delta);
  PHALANX_CHECK(residual.dtype == DType::kF32 && is_act(delta.dtype));
  PHALANX_CHECK(residual.rows == delta.rows && residual.cols == delta.cols);
}

void check_kv(const KvLayer& kv) {
  PHALANX_CHECK(kv.k != nullptr && kv.v != nullptr);
  if (kv.dtype == DType::kI8) {
    const bool fixed = kv.k_scale != nullptr;
    const bool dynamic = kv.k_row_scale != nullptr;
    PHALANX_CHECK(fixed != dynamic && (kv.v_scale != nullptr) == fixed);
    PHALANX_CHECK((kv.v_row_scale != nullptr) == dynamic);
    PHALANX_CHECK(fixed || (kv.k_offset == nullptr && kv.v_offset == nullptr));
  } else {
    PHALANX_CHECK(is_act(kv.dtype) && kv.k_scale == nullptr && kv.v_scale == nullptr);
    PHALANX_CHECK(kv.k_row_scale == nullptr && kv.v_row_scale == nullptr);
  }
  PHALANX_CHECK(!kv.shared() || (kv.k_scale == nullptr && kv.k_row_scale == kv.v_row_scale));
  PHALANX_CHECK(kv.block_size > 0 && kv.kv_heads > 0 && kv.head_dim > 0);
}

}  // namespace

void linear(Context& ctx, const MatrixView& x, const PackedLinear& w, const float* bias,
            const MatrixView& out) {
  if (!w.parts.empty()) {
    int64_t begin = 0;
    for (const PackedLinear& part : w.parts) {
      linear(ctx, x, part, bias != nullptr ? bias + begin : nullptr,
             out.columns(begin, part.rows));
      begin += part.rows;
    }
    PHALANX_CHECK(begin == w.rows && begin == out.cols);
    return;
  }
  check_linear(x, w, w.rows, out);
  ctx.observe(x);
  if (w.own_bias != nullptr) bias = w.own_bias;
  if (is_float(w)) {
    if (on_reference(ctx)) return ref::linear(x, w, bias, out, kFma32);
    return cpu::linear(ctx, x, w, bias, out);
  }
  if (on_reference(ctx)) return ref::linear_quantised(x, w, bias, out, kFma32);
  cpu::linear_quantised(ctx, x, w, bias, out);
}

void gated_linear(Context& ctx, const MatrixView& x, const PackedGated& w, const float* gate_bias,
                  const float* up_bias, const MatrixView& out) {
  ctx.observe(x);
  if (w.own_gate_bias != nullptr) gate_bias = w.own_gate_bias;
  if (w.own_up_bias != nullptr) up_bias = w.own_up_bias;
  if (w.halves.empty()) {
    check_linear(x, w.panels, w.rows, out);
    PHALANX_CHECK(w.panels.rows == 2 * panels_of(w.rows) * tensor::kPanelRows);
  } else {
    PHALANX_CHECK(w.halves.size() == 2);
    for (const PackedLinear& half : w.halves) check_linear(x, half, w.rows, out);
  }
  if (w.halves.empty() && is_float(w.panels)) {
    if (on_reference(ctx)) return ref::gated_linear(x, w, gate_bias, up_bias, out, kFma32);
    return cpu::gated_linear(ctx, x, w, gate_bias, up_bias, out);
  }
  if (on_reference(ctx)) return ref::gated_quantised(x, w, gate_bias, up_bias, out, kFma32);
  cpu::gated_quantised(ctx, x, w, gate_bias, up_bias, out);
}

void rms_norm(Context& ctx, const MatrixView& x, const float* weight, float eps,
              const MatrixView& out, const float* bias) {
  check_norm(x, weight, out);
  if (on_reference(ctx)) return ref::rms_norm(x, weight, eps, bias, out);
  cpu::add_norm(ctx, x, nullptr, weight, eps, bias, &out);
}

void add_rms_norm(Context& ctx, const MatrixView& residual, const MatrixView& delta,
                  const float* weight, float eps, const MatrixView& out, const float* bias) {
  check_add(residual, delta);
  check_norm(residual, weight, out);
  if (!on_reference(ctx)) return cpu::add_norm(ctx, residual, &delta, weight, eps, bias, &out);
  ref::add(residual, delta);
  ref::rms_norm(residual, weight, eps, bias, out);
}

void add(Context& ctx, const MatrixView& residual, const MatrixView& delta) {
  check_add(residual, delta);
  if (on_reference(ctx)) return ref::add(residual, delta);
  cpu::add_norm(ctx, residual, &delta, nullptr, 0, nullptr, nullptr);
}

void rope_and_store(Context& ctx, const MatrixView& qkv, int64_t q_heads, const RopeTable& rope,
                    std::span<const int32_t> positions, std::span<const int32_t> slots,
                    const KvLayer& kv) {
  check_matrix(qkv);
  check_kv(kv);
  PHALANX_CHECK(is_act(qkv.dtype) && q_heads >= 0);
  PHALANX_CHECK(qkv.cols == (q_heads + (kv.shared() ? 1 : 2) * kv.kv_heads) * kv.head_dim);
  PHALANX_CHECK(rope.rotary_dim % 2 == 0 && rope.rotary_dim <= kv.head_dim);
  PHALANX_CHECK(static_cast<int64_t>(positions.size()) == qkv.rows &&
                static_cast<int64_t>(slots.size()) == qkv.rows);
  for (int64_t t = 0; t < qkv.rows; ++t) {
    PHALANX_CHECK(positions[t] >= 0 && positions[t] < rope.positions);
    PHALANX_CHECK(slots[t] >= 0 && slots[t] / kv.block_size < kv.blocks);
  }
  if (on_reference(ctx)) return ref::rope_and_store(qkv, q_heads, rope, positions, slots, kv);
  cpu::rope_and_store(ctx, qkv, q_heads, rope, positions, slots, kv);
}

void attention(Context& ctx, const MatrixView& qkv, std::span<const SequenceSlice> sequences,
               const AttentionShape& shape, const KvLayer& kv, const MatrixView& out) {
  check_matrix(qkv);
  check_matrix(out);
  check_kv(kv);
  PHALANX_CHECK(is_act(qkv.dtype) && is_act(out.dtype) && kv.head_dim == shape.head_dim);
  PHALANX_CHECK(qkv.cols >= shape.q_heads * shape.head_dim && qkv.rows == out.rows);
  PHALANX_CHECK(out.cols == shape.q_heads * shape.head_dim);
  PHALANX_CHECK(shape.group > 0 && shape.q_heads > 0 && shape.window >= 0 && shape.scale > 0);
  PHALANX_CHECK(shape.q_head_begin / shape.group >= shape.kv_head_begin);
  PHALANX_CHECK((shape.q_head_begin + shape.q_heads - 1) / shape.group <
                shape.kv_head_begin + kv.kv_heads);
  for (const SequenceSlice& s : sequences) {
    PHALANX_CHECK(s.token_begin >= 0 && s.token_count >= 0 && s.token_count <= s.context);
    PHALANX_CHECK(s.token_begin + s.token_count <= qkv.rows && s.block_table != nullptr);
  }
  if (on_reference(ctx)) return ref::attention(qkv, sequences, shape, kv, out, kFma32);
  cpu::attention(ctx, qkv, sequences, shape, kv, out);
}

}  // namespace phalanx::ops
