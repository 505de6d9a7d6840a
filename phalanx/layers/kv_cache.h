#pragma once

#include <vector>

#include "phalanx/layers/memory.h"
#include "phalanx/ops/ops.h"

namespace phalanx::layers {

// The paged K and V of all layers on this rank. Each layer is two tensors
// [block][kv_head][block_size * head_dim] (ops/kv_layout.h), or one where keys are values. Untouched
// blocks take no memory.
class KvCache {
 public:
  struct Shape {
    int64_t layers = 0;
    int64_t kv_heads = 0;  // stored on this rank
    int64_t head_dim = 0;
    int64_t block_size = 0;
    tensor::DType dtype = tensor::DType::kBF16;
    bool shared = false;      // each row is key and value at once
    bool row_scales = false;  // int8 with an f32 scale per token and head, in tensors of their own

    [[nodiscard]] int64_t bytes_per_block() const {
      return tensors() * layers * (values_per_block() + scales_per_block());
    }
    [[nodiscard]] int64_t tensors() const { return shared ? 1 : 2; }  // of a layer
    // Bytes of a block's keys (or values) in one layer, and of their scales.
    [[nodiscard]] int64_t values_per_block() const {
      return kv_heads * head_dim * block_size * static_cast<int64_t>(tensor::dtype_bytes(dtype));
    }
    [[nodiscard]] int64_t scales_per_block() const {
      return row_scales ? kv_heads * block_size * static_cast<int64_t>(sizeof(float)) : 0;
    }
  };
  KvCache() = default;
  KvCache(const Shape& shape, int64_t blocks);
  [[nodiscard]] const ops::KvLayer& layer(int64_t i) const {
    return layers_[static_cast<size_t>(i)];
  }
  [[nodiscard]] bool allocated() const { return !layers_.empty(); }

 private:
  Memory memory_;
  std::vector<ops::KvLayer> layers_;
};

}  // namespace phalanx::layers
