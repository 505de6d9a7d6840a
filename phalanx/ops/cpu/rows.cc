#include <algorithm>
#include <cstring>

#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/cpu/kernels.h"
#include "phalanx/ops/kv_layout.h"
#include "phalanx/ops/scratch.h"

namespace phalanx::ops::cpu {
namespace {

// Rows per piece such that a piece is worth waking a thread for (about 64 KiB of f32).
int64_t rows_per_piece(int64_t cols) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cols));
}

constexpr int64_t kMaxHeadDim = 1024;

// A row of one head into its places in the cache: keys in words of two channels, 16 positions
// apart; values beside those of the neighbouring position.
template <typename T>
void scatter(const KvLayer& kv, int64_t block, int64_t head, int64_t offset, bool key,
             const T* row) {
  T* to = reinterpret_cast<T*>(key ? kv.k : kv.v) + kv_head_index(kv, block, head);
  const int64_t n = kv.head_dim;
  if (!kv_in_panels(kv)) {
    std::copy_n(row, n, to + offset * n);
  } else if (kv.dtype == DType::kF32) {
    to += key ? key_panel_index(offset, 0, n, true) : value_panel_index(offset, 0, n, true);
    const int64_t stride = key ? kKvUnit : 1;
    for (int64_t i = 0; i < n; ++i) to[i * stride] = row[i];
  } else if (key) {
    to += key_panel_index(offset, 0, n, false);
    for (int64_t i = 0; i < n; i += 2) std::memcpy(to + i * kKvUnit, row + i, 2 * sizeof(T));
  } else {
    to += value_panel_index(offset, 0, n, false);
    for (int64_t i = 0; i < n; ++i) to[2 * i] = row[i];
  }
}

// row: as the cache keeps it, or, for int8, f32.
void store_row(const Kernels& kernels, const KvLayer& kv, int64_t block, int64_t head,
               int64_t offset, bool key, const std::byte* row, const float* scales,
               const float* offsets, float* row_scale) {
  const auto* f32 = reinterpret_cast<const float*>(row);
  if (kv.dtype == DType::kF32) return scatter(kv, block, head, offset, key, f32);
  if (kv.dtype == DType::kBF16)
    return scatter(kv, block, head, offset, key, reinterpret_cast<const uint16_t*>(row));
  int8_t small[kMaxHeadDim];
  const int64_t first = head * kv.head_dim;
  const float own =
      kernels.quantise(f32, scales != nullptr ? scales + first : nullptr,
                       offsets != nullptr ? offsets + first : nullptr, kv.head_dim, small);
  if (row_scale != nullptr) *row_scale = own;
  scatter(kv, block, head, offset, key, small);
}

}  // namespace

void add_norm(Context& ctx, const MatrixView& residual, const MatrixView* delta,
              const float* weight, float eps, const float* bias, const MatrixView* out) {
  const Kernels& kernels = *ctx.scratch().kernels;
  ctx.pool().for_each(residual.rows, rows_per_piece(residual.cols), [&](int64_t t) {
    auto* row = residual.row<float>(t);
    if (delta != nullptr) {
      const bool bf16 = delta->dtype == DType::kBF16;
      const void* d = bf16 ? static_cast<const void*>(delta->row<const uint16_t>(t))
                           : delta->row<const float>(t);
      kernels.add(row, d, bf16, residual.cols);
    }
    if (out != nullptr) {
      const bool bf16 = out->dtype == DType::kBF16;
      void* o = bf16 ? static_cast<void*>(out->row<uint16_t>(t)) : out->row<float>(t);
      kernels.rms_norm(row, weight, eps, bias, residual.cols, o, bf16);
    }
  });
}

void rope_and_store(Context& ctx, const MatrixView& qkv, int64_t q_heads, const RopeTable& rope,
                    std::span<const int32_t> positions, std::span<const int32_t> slots,
                    const KvLayer& kv) {
  const Kernels& kernels = *ctx.scratch().kernels;
  const int64_t head_dim = kv.head_dim;
  const int64_t half = rope.rotary_dim / 2;
  const bool in_bf16 = qkv.dtype == DType::kBF16;
  const auto in_bytes = static_cast<int64_t>(tensor::dtype_bytes(qkv.dtype));
  PHALANX_CHECK(head_dim <= kMaxHeadDim);
  ctx.pool().for_each(qkv.rows, rows_per_piece(qkv.cols), [&](int64_t t) {
    const float* cos = rope.cos.data() + positions[static_cast<size_t>(t)] * half;
    const float* sin = rope.sin.data() + positions[static_cast<size_t>(t)] * half;
    auto head = [&](int64_t h) {
      return static_cast<std::byte*>(qkv.data) + (t * qkv.stride + h * head_dim) * in_bytes;
    };
    for (int64_t h = 0; h < q_heads; ++h)
      kernels.rope(head(h), in_bf16, cos, sin, half, head_dim, head(h), in_bf16);
    const int64_t block = slots[static_cast<size_t>(t)] / kv.block_size;
    const int64_t offset = slots[static_cast<size_t>(t)] % kv.block_size;
    const bool to_bf16 = kv.dtype == DType::kBF16;
    alignas(64) std::byte row[kMaxHeadDim * 4];
    for (int64_t h = 0; h < kv.kv_heads; ++h) {
      const int64_t scale = kv_scale_index(kv, block, h, offset);
      kernels.rope(head(q_heads + h), in_bf16, cos, sin, half, head_dim, row, to_bf16);
      store_row(kernels, kv, block, h, offset, true, row, kv.k_scale, kv.k_offset,
                kv.k_row_scale != nullptr ? kv.k_row_scale + scale : nullptr);
      if (kv.shared()) continue;
      kernels.convert(head(q_heads + kv.kv_heads + h), in_bf16, head_dim, row, to_bf16);
      store_row(kernels, kv, block, h, offset, false, row, kv.v_scale, kv.v_offset,
                kv.v_row_scale != nullptr ? kv.v_row_scale + scale : nullptr);
    }
  });
}

}  // namespace phalanx::ops::cpu
