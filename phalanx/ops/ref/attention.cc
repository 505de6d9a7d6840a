#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

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
  for (size_t i = 0; i < into.o.size(); ++i)
    into.o[i] = std::fma(into.o[i], a, chunk.o[i] * b);
}

}  // namespace

void attention(const MatrixView& qkv, std::span<const SequenceSlice> sequences,
               const AttentionShape& shape, const KvLayer& kv, const MatrixView& out,
               NumericClass numeric_class) {
  const int64_t head_dim = shape.head_dim;
  const bool pairs = numeric_class == NumericClass::kBf16Dp && qkv.dtype == DType::kBF16 &&
                     kv.dtype == DType::kBF16;
  for (const SequenceSlice& sequence : sequences) {
    for (int64_t n = 0; n < sequence.token_count; ++n) {
      const int64_t t = sequence.token_begin + n;
      const int64_t position = sequence.context - sequence.token_count + n;
      const int64_t first =
          shape.window > 0 ? std::max<int64_t>(0, position - shape.window + 1) : 0;
      for (int64_t head = 0; head < shape.q_heads; ++head) {
        const int64_t kv_head = (shape.q_head_begin + head) / shape.group - shape.kv_head_begin;
        auto at = [&](int64_t j) {
          const int64_t block = sequence.block_table[j / kv.block_size];
          return ((block * kv.kv_heads + kv_head) * kv.block_size + j % kv.block_size) * head_dim;
        };
        auto query = [&](int64_t i) {
          return i < head_dim ? load(qkv.data, qkv.dtype, t * qkv.stride + head * head_dim + i) : 0;
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
              return i < head_dim ? load(kv.k, kv.dtype, at(j) + i) : 0.0f;
            };
            float s = 0;
            if (pairs) {
              for (int64_t i = 0; i < head_dim; i += 2)
                s = dot_pair(s, key(i), key(i + 1), query(i), query(i + 1));
            } else {
              for (int64_t i = 0; i < head_dim; ++i) s = std::fma(key(i), query(i), s);
            }
            scores[j - c] = s * shape.scale;
            chunk.max = chunk.max > scores[j - c] ? chunk.max : scores[j - c];
          }
          float lanes[16] = {};
          chunk.o.assign(head_dim, 0.0f);
          for (int64_t j = begin; j < end; ++j) {
            const float p = exp32(scores[j - c] - chunk.max);
            lanes[(j - c) % 16] += p;
            for (int64_t i = 0; i < head_dim; ++i)
              chunk.o[i] = std::fma(load(kv.v, kv.dtype, at(j) + i), p, chunk.o[i]);
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
        for (int64_t i = 0; i < head_dim; ++i)
          store(out.data, out.dtype, t * out.stride + head * head_dim + i, all.o[i] / all.sum);
      }
    }
  }
}

}  // namespace phalanx::ops::ref
