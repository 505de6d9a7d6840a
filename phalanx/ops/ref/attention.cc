#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "phalanx/ops/kv_layout.h"
#include "phalanx/ops/ref/element.h"
#include "phalanx/ops/ref/ref.h"

namespace phalanx::ops::ref {
namespace {

// Softmax state of a query row: o = sum of exp(s - max) * v, not yet divided by sum.
struct Partial {
  float max = 0;
  float sum = 0;
  std::vector<float> o;
};

void merge(Partial& into, const Partial& chunk) {
  const float max = into.max > chunk.max ? into.max : chunk.max;
  const float a = exp32(into.max - max);
  const float b = exp32(chunk.max - max);
  into.max = max;
  into.sum = std::fma(into.sum, a, chunk.sum * b);
  for (size_t i = 0; i < into.o.size(); ++i) into.o[i] = std::fma(into.o[i], a, chunk.o[i] * b);
}

}  // namespace

void attention(const MatrixView& qkv, std::span<const SequenceSlice> sequences,
               const AttentionShape& shape, const KvLayer& kv, const MatrixView& out,
               NumericClass numeric_class) {
  const int64_t head_dim = shape.head_dim;
  const bool pairs = sums_pairs(numeric_class) && qkv.dtype == DType::kBF16 &&
                     kv.dtype != DType::kF32;
  auto rounded = [&](float x) { return pairs ? tensor::bf16_to_f32(tensor::f32_to_bf16(x)) : x; };
  for (const SequenceSlice& sequence : sequences) {
    for (int64_t n = 0; n < sequence.token_count; ++n) {
      const int64_t t = sequence.token_begin + n;
      const int64_t position = sequence.context - sequence.token_count + n;
      const int64_t first =
          shape.window > 0 ? std::max<int64_t>(0, position - shape.window + 1) : 0;
      for (int64_t head = 0; head < shape.q_heads; ++head) {
        const int64_t kv_head = (shape.q_head_begin + head) / shape.group - shape.kv_head_begin;
        auto block = [&](int64_t j) { return int64_t{sequence.block_table[j / kv.block_size]}; };
        auto scale_of = [&](const float* scales, int64_t j) {
          return scales == nullptr
                     ? 1.0f
                     : scales[kv_scale_index(kv, block(j), kv_head, j % kv.block_size)];
        };
        auto channel = [&](const float* values, int64_t i) {
          return values[kv_head * head_dim + i];
        };
        auto query = [&](int64_t i) {
          if (i >= head_dim) return 0.0f;
          const float q = load(qkv.data, qkv.dtype, t * qkv.stride + head * head_dim + i);
          return kv.k_scale != nullptr ? rounded(q * channel(kv.k_scale, i)) : q;
        };
        auto value = [&](int64_t j, int64_t i) {
          return load(kv.v, kv.dtype, kv_value_index(kv, block(j), kv_head, j % kv.block_size, i));
        };
        Partial all;
        bool merged = false;
        for (int64_t c = first / kAttentionChunk * kAttentionChunk; c <= position;
             c += kAttentionChunk) {
          const int64_t begin = std::max(c, first);
          const int64_t end = std::min(c + kAttentionChunk, position + 1);
          Partial chunk;
          chunk.max = -std::numeric_limits<float>::infinity();
          std::vector<float> scores(kAttentionChunk);
          for (int64_t j = begin; j < end; ++j) {
            auto key = [&](int64_t i) {
              return i < head_dim ? load(kv.k, kv.dtype,
                                         kv_key_index(kv, block(j), kv_head, j % kv.block_size, i))
                                  : 0.0f;
            };
            float s = 0;
            if (pairs) {
              for (int64_t i = 0; i < head_dim; i += 2)
                s = dot_pair(s, key(i), key(i + 1), query(i), query(i + 1));
            } else {
              for (int64_t i = 0; i < head_dim; ++i) s = std::fma(key(i), query(i), s);
            }
            if (kv.k_row_scale != nullptr) s *= scale_of(kv.k_row_scale, j);
            scores[j - c] = s;
            chunk.max = chunk.max > scores[j - c] ? chunk.max : scores[j - c];
          }
          chunk.max *= shape.scale;
          float lanes[16] = {};
          chunk.o.assign(head_dim, 0.0f);
          std::vector<float> weights(kAttentionChunk);
          for (int64_t j = begin; j < end; ++j) {
            const float p = exp32(std::fma(scores[j - c], shape.scale, -chunk.max));
            lanes[(j - c) % 16] += p;
            const float weight = kv.v_row_scale != nullptr ? p * scale_of(kv.v_row_scale, j) : p;
            const bool subnormal = std::fabs(weight) < std::numeric_limits<float>::min();
            weights[j - c] = pairs && subnormal ? 0.0f : rounded(weight);
          }
          for (int64_t i = 0; i < head_dim; ++i) {
            float o = 0;
            if (pairs) {
              auto seen = [&](int64_t j) { return j >= begin && j < end ? value(j, i) : 0.0f; };
              for (int64_t j = begin / 2 * 2; j < end; j += 2)
                o = dot_pair(o, seen(j), seen(j + 1), weights[j - c], weights[j + 1 - c]);
            } else {
              for (int64_t j = begin; j < end; ++j) o = std::fma(value(j, i), weights[j - c], o);
            }
            chunk.o[i] = o;
          }
          for (int width = 8; width > 0; width /= 2)
            for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
          chunk.sum = lanes[0];
          if (merged)
            merge(all, chunk);
          else
            all = chunk;
          merged = true;
        }
        for (int64_t i = 0; i < head_dim; ++i) {
          float o = all.o[i] / all.sum;
          if (kv.v_offset != nullptr) o -= channel(kv.v_offset, i);
          if (kv.v_scale != nullptr) o *= channel(kv.v_scale, i);
          store(out.data, out.dtype, t * out.stride + head * head_dim + i, o);
        }
      }
    }
  }
}

}  // namespace phalanx::ops::ref
