#include <algorithm>

#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/cpu/kernels.h"
#include "phalanx/ops/scratch.h"

namespace phalanx::ops::cpu {
namespace {

// Rows per piece such that a piece is worth waking a thread for (about 64 KiB of f32).
int64_t rows_per_piece(int64_t cols) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cols));
}

}  // namespace

void add_norm(Context& ctx, const MatrixView& residual, const MatrixView* delta,
              const float* weight, float eps, const MatrixView* out) {
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
      kernels.rms_norm(row, weight, eps, residual.cols, o, bf16);
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
  const bool kv_bf16 = kv.dtype == DType::kBF16;
  const auto in_bytes = static_cast<int64_t>(tensor::dtype_bytes(qkv.dtype));
  const auto kv_bytes = static_cast<int64_t>(tensor::dtype_bytes(kv.dtype));
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
    for (int64_t h = 0; h < kv.kv_heads; ++h) {
      const int64_t to =
          ((block * kv.kv_heads + h) * kv.block_size + offset) * head_dim * kv_bytes;
      kernels.rope(head(q_heads + h), in_bf16, cos, sin, half, head_dim, kv.k + to, kv_bf16);
      kernels.convert(head(q_heads + kv.kv_heads + h), in_bf16, head_dim, kv.v + to, kv_bf16);
    }
  });
}

}  // namespace phalanx::ops::cpu
