#include "phalanx/layers/kv_cache.h"

namespace phalanx::layers {

KvCache::KvCache(const Shape& shape, int64_t blocks)
    : memory_(shape.bytes_per_block() * blocks, "the KV cache of this rank") {
  const int64_t half = shape.layers == 0 ? 0 : shape.bytes_per_block() / (2 * shape.layers) * blocks;
  std::byte* at = memory_.data();
  for (int64_t i = 0; i < shape.layers; ++i) {
    ops::KvLayer layer{.dtype = shape.dtype,
                       .blocks = blocks,
                       .block_size = shape.block_size,
                       .kv_heads = shape.kv_heads,
                       .head_dim = shape.head_dim};
    if (half > 0) {
      layer.k = at;
      layer.v = at + half;
      at += 2 * half;
    }
    layers_.push_back(layer);
  }
}

}  // namespace phalanx::layers
