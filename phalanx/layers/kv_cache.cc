#include "phalanx/layers/kv_cache.h"

namespace phalanx::layers {
namespace {

// Where a tensor of the cache begins; f32 scales lie among int8 values of any count.
constexpr int64_t kAlignment = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

KvCache::KvCache(const Shape& shape, int64_t blocks)
    : memory_(shape.tensors() * shape.layers *
                  (aligned(shape.values_per_block() * blocks) +
                   aligned(shape.scales_per_block() * blocks)),
              "the KV cache of this rank") {
  std::byte* at = memory_.data();
  const auto take = [&](int64_t bytes) {
    std::byte* begin = bytes > 0 ? at : nullptr;
    at += aligned(bytes);
    return begin;
  };
  for (int64_t i = 0; i < shape.layers; ++i) {
    ops::KvLayer layer{.dtype = shape.dtype,
                       .blocks = blocks,
                       .block_size = shape.block_size,
                       .kv_heads = shape.kv_heads,
                       .head_dim = shape.head_dim};
    layer.k = take(shape.values_per_block() * blocks);
    layer.v = shape.shared ? layer.k : take(shape.values_per_block() * blocks);
    const auto scales = [&] {
      return reinterpret_cast<float*>(take(shape.scales_per_block() * blocks));
    };
    layer.k_row_scale = scales();
    layer.v_row_scale = shape.shared ? layer.k_row_scale : scales();
    layers_.push_back(layer);
  }
}

}  // namespace phalanx::layers
