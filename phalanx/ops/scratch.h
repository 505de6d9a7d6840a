#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "phalanx/ops/cpu/integer_kernels.h"
#include "phalanx/ops/cpu/kernels.h"
#include "phalanx/ops/ops.h"

namespace phalanx::ops {

// Tokens whose f32 results one thread keeps while it walks through k.
inline constexpr int64_t kTokenBlock = 384;
// k of a panel that is expanded at once.
inline constexpr int64_t kExpandK = 1024;
// Tokens of a gated layer of two formats that are done at once.
inline constexpr int64_t kHalvesTokens = 32;
// Inputs whose weights are widened to f32 at a time, for all tokens of an item.
inline constexpr int64_t kWidenK = 512;
// Query rows (tokens times heads of one group) that share one packing of keys and values.
inline constexpr int64_t kQueryRows = 96;

// Part of the attention of one KV head, done by one thread.
struct AttentionItem {
  int32_t sequence = 0;
  int32_t kv_head = 0;
  int32_t token_begin = 0;  // within the slice
  int32_t token_end = 0;
  int32_t chunk_begin = 0;
  int32_t chunk_end = 0;
  // A shared-out block: where its results go (one per chunk and row), and, on its first item, how
  // many chunks the block has. -1: one item merges all chunks itself.
  int64_t partial = -1;
  int32_t block_chunks = 0;
};

// The memory of one thread, all 64-byte aligned.
struct ThreadScratch {
  float* sums = nullptr;      // [kTokenBlock][16 * kGroupPanels] of a product
  float* widened = nullptr;   // [kGroupPanels][kWidenK][16]: weights of f32 products
  void* queries = nullptr;    // [rows][head_dim], f32 or bf16
  std::byte* keys = nullptr;  // kAttentionChunk positions, in panels: KV that is not stored so
  std::byte* values = nullptr;
  float* key_scales = nullptr;  // [kAttentionChunk], of int8 KV
  float* value_scales = nullptr;
  float* scores = nullptr;     // [rows][kAttentionChunk], then the weights of the values
  float* chunk_out = nullptr;  // [rows][padded head_dim]
  float* out = nullptr;        // [rows][padded head_dim]
  float* chunk_max = nullptr;  // [rows]
  float* chunk_sum = nullptr;
  float* max = nullptr;
  float* sum = nullptr;
  int32_t* begin = nullptr;  // [rows], positions seen in a chunk
  int32_t* end = nullptr;
  // Of quantised weights:
  std::byte* expanded = nullptr;  // [kGroupPanels][kExpandK][16] of bf16
  float* totals = nullptr;        // [kTokenBlock][16 * kGroupPanels]
};

struct Context::Scratch {
  const cpu::Kernels* kernels = nullptr;  // nullptr: the reference
  int64_t query_rows = 0;                 // rows of an attention item
  int64_t bytes = 0;
  int64_t max_tokens = 0;
  int64_t max_k = 0;
  int64_t max_head_dim = 0;

  // Of quantised weights, for kTokenBlock tokens (nullptr unless Options::quantised):
  const cpu::IntegerKernels* integers = nullptr;
  void (*multiply_codes)(const cpu::Product&) = nullptr;  // of those that became bf16
  std::byte* prepared = nullptr;  // [kTokenBlock][prepared_stride]: quantised or reordered inputs
  int64_t prepared_stride = 0;    // bytes
  float* token_scale = nullptr;   // [kTokenBlock]
  int32_t* token_sum = nullptr;   // [kTokenBlock]
  float* group_sums = nullptr;    // [kTokenBlock][max_k / kLeastGroup + 1]
  float* halves = nullptr;        // [kHalvesTokens][2 * max_rows]

  float* widened = nullptr;  // [max_tokens][max_k]: bf16 inputs of f32 products
  std::vector<ThreadScratch> threads;

  // Results of attention chunks that several threads share out: [partials][padded head_dim + 16]:
  // output, then max and sum.
  float* partials = nullptr;
  int64_t max_partials = 0;
  std::vector<AttentionItem> items;  // room reserved

  alignas(64) std::atomic<int64_t> next_item{0};

  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> memory;
};

}  // namespace phalanx::ops
