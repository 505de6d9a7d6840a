#include <algorithm>
#include <cmath>

#include "phalanx/ops/kv_layout.h"
#include "phalanx/ops/ref/element.h"
#include "phalanx/ops/ref/ref.h"

namespace phalanx::ops::ref {
namespace {

// To the nearest even integer, clamped; NaN becomes 0.
int8_t to_int8(float x) {
  if (std::isnan(x)) return 0;
  return static_cast<int8_t>(std::nearbyint(std::clamp(x, -128.0f, 127.0f)));
}

}  // namespace

void rms_norm(const MatrixView& x, const float* weight, float eps, const float* bias,
              const MatrixView& out) {
  for (int64_t t = 0; t < x.rows; ++t) {
    const float* row = x.row<const float>(t);
    float lanes[16] = {};
    for (int64_t i = 0; i < x.cols; ++i) lanes[i % 16] = std::fma(row[i], row[i], lanes[i % 16]);
    for (int width = 8; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    const float mean = lanes[0] / static_cast<float>(x.cols);
    const float scale = 1.0f / std::sqrt(mean + eps);
    for (int64_t i = 0; i < x.cols; ++i)
      store(out.data, out.dtype, t * out.stride + i,
            bias == nullptr ? row[i] * scale * weight[i] : row[i] * scale * weight[i] + bias[i]);
  }
}

void add(const MatrixView& residual, const MatrixView& delta) {
  for (int64_t t = 0; t < residual.rows; ++t)
    for (int64_t i = 0; i < residual.cols; ++i)
      residual.row<float>(t)[i] += load(delta.data, delta.dtype, t * delta.stride + i);
}

void rope_and_store(const MatrixView& qkv, int64_t q_heads, const RopeTable& rope,
                    std::span<const int32_t> positions, std::span<const int32_t> slots,
                    const KvLayer& kv) {
  const int64_t head_dim = kv.head_dim;
  const int64_t half = rope.rotary_dim / 2;
  for (int64_t t = 0; t < qkv.rows; ++t) {
    const float* cos = rope.cos.data() + positions[t] * half;
    const float* sin = rope.sin.data() + positions[t] * half;
    const int64_t block = slots[t] / kv.block_size;
    const int64_t offset = slots[t] % kv.block_size;
    auto value = [&](int64_t head, int64_t i) {
      return load(qkv.data, qkv.dtype, t * qkv.stride + head * head_dim + i);
    };
    auto rotated = [&](int64_t head, int64_t i) {
      if (i < half) return std::fma(value(head, i), cos[i], -(value(head, i + half) * sin[i]));
      if (i < 2 * half)
        return std::fma(value(head, i), cos[i - half], value(head, i - half) * sin[i - half]);
      return value(head, i);
    };
    for (int64_t head = 0; head < kv.kv_heads; ++head) {
      auto keep = [&](std::byte* to, const float* scale, const float* shift, float* row_scale,
                      auto index, auto element) {
        float largest = 0;
        for (int64_t i = 0; i < head_dim; ++i) {
          const float x = std::fabs(element(i));
          largest = x > largest ? x : largest;
        }
        const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        if (row_scale != nullptr)
          row_scale[kv_scale_index(kv, block, head, offset)] = largest / 127.0f;
        for (int64_t i = 0; i < head_dim; ++i) {
          const float x = element(i);
          if (kv.dtype != DType::kI8) {
            store(to, kv.dtype, index(i), x);
            continue;
          }
          const int64_t c = head * head_dim + i;
          const float scaled =
              scale != nullptr ? x / scale[c] + (shift != nullptr ? shift[c] : 0.0f) : x * inverse;
          reinterpret_cast<int8_t*>(to)[index(i)] = to_int8(scaled);
        }
      };
      keep(
          kv.k, kv.k_scale, kv.k_offset, kv.k_row_scale,
          [&](int64_t i) { return kv_key_index(kv, block, head, offset, i); },
          [&](int64_t i) { return rotated(q_heads + head, i); });
      if (kv.shared()) continue;
      keep(
          kv.v, kv.v_scale, kv.v_offset, kv.v_row_scale,
          [&](int64_t i) { return kv_value_index(kv, block, head, offset, i); },
          [&](int64_t i) { return value(q_heads + kv.kv_heads + head, i); });
    }
    for (int64_t head = 0; head < q_heads; ++head) {
      const int64_t at = t * qkv.stride + head * head_dim;
      for (int64_t i = 0; i < half; ++i) {
        const float low = rotated(head, i);
        const float high = rotated(head, i + half);
        store(qkv.data, qkv.dtype, at + i, low);
        store(qkv.data, qkv.dtype, at + i + half, high);
      }
    }
  }
}

}  // namespace phalanx::ops::ref
