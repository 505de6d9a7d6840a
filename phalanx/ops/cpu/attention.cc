#include <algorithm>
#include <cstring>

#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/cpu/kernels.h"
#include "phalanx/ops/cpu/keys_as_values.h"
#include "phalanx/ops/cpu/runs.h"
#include "phalanx/ops/kv_layout.h"
#include "phalanx/ops/scratch.h"

namespace phalanx::ops::cpu {
namespace {

using tensor::Range;
constexpr int64_t kLanes = 16;
constexpr int64_t kChunkUnits = kAttentionChunk / kKvUnit;
// How far ahead of their use keys and values are asked for.
constexpr int64_t kAheadBytes = 16384;

KvType type_of(DType dtype) {
  return dtype == DType::kF32 ? KvType::kF32 : dtype == DType::kBF16 ? KvType::kBF16 : KvType::kI8;
}

// One call of attention. A block of query rows of one KV head passes together over each chunk of
// keys and values; its rows are (token, head of the group), token by token. Rows differ in the
// positions they see: no row's output takes in a value that it must not see, not even times zero.
class Attention {
 public:
  Attention(Context& ctx, const MatrixView& qkv, std::span<const SequenceSlice> sequences,
            const AttentionShape& shape, const KvLayer& kv, const MatrixView& out)
      : scratch_(ctx.scratch()),
        kernels_(*scratch_.kernels),
        pool_(ctx.pool()),
        qkv_(qkv),
        sequences_(sequences),
        shape_(shape),
        kv_(kv),
        out_(out),
        padded_((shape.head_dim + kLanes - 1) / kLanes * kLanes),
        pairs_(kernels_.pairs && qkv.dtype == DType::kBF16 && kv.dtype != DType::kF32),
        in_panels_(kv_in_panels(kv)),
        element_(static_cast<int64_t>(tensor::dtype_bytes(kv.dtype))) {
    PHALANX_CHECK(shape.head_dim <= scratch_.max_head_dim && shape.q_heads <= scratch_.query_rows);
  }

  void run() {
    plan();
    scratch_.next_item.store(0, std::memory_order_relaxed);
    const auto count = static_cast<int64_t>(scratch_.items.size());
    const int64_t threads = pool_.size();
    bool shared = false;
    bool decode = true;
    for (const AttentionItem& item : scratch_.items) {
      shared |= item.partial >= 0;
      decode &= item.token_end - item.token_begin == 1;
    }
    auto work = [&](int thread) {
      const ThreadScratch& t = scratch_.threads[static_cast<size_t>(thread)];
      for (;;) {
        // Short items in runs, so that the keys of the next one can be asked for.
        const Range run = take_run(scratch_.next_item, count, decode ? threads : count);
        if (run.size() == 0) return;
        for (int64_t i = run.begin; i < run.end; ++i)
          run_item(scratch_.items[static_cast<size_t>(i)],
                   i + 1 < run.end ? &scratch_.items[static_cast<size_t>(i + 1)] : nullptr, t);
      }
    };
    if (count == 1)
      work(0);
    else
      pool_.run(work);
    if (shared)
      pool_.for_each(count, 1, [&](int64_t i) {
        const AttentionItem& item = scratch_.items[static_cast<size_t>(i)];
        if (item.block_chunks > 0) merge_chunks(item);
      });
  }

 private:
  // A block as its rows see it.
  struct Rows {
    int64_t heads = 0;        // of the group, on this rank
    int64_t first_head = 0;   // local
    int64_t first_token = 0;  // of the step
    int64_t first_position = 0;
    int64_t count = 0;
    int64_t window = 0;

    [[nodiscard]] int64_t position(int64_t r) const { return first_position + r / heads; }
    // Positions that row r sees.
    [[nodiscard]] Range seen(int64_t r) const {
      const int64_t p = position(r);
      return {window > 0 ? std::max<int64_t>(0, p - window + 1) : 0, p + 1};
    }
    // Those of them in chunk c; may be empty.
    [[nodiscard]] Range seen(int64_t r, int64_t c) const {
      const Range all = seen(r);
      const int64_t begin = std::clamp(all.begin, c * kAttentionChunk, (c + 1) * kAttentionChunk);
      return {begin, std::max(begin, std::min(all.end, (c + 1) * kAttentionChunk))};
    }
    [[nodiscard]] bool begins_in(int64_t r, int64_t c) const {
      return seen(r).begin / kAttentionChunk == c;
    }
    // Chunks that any row sees.
    [[nodiscard]] Range chunks() const {
      return {seen(0).begin / kAttentionChunk, (seen(count - 1).end - 1) / kAttentionChunk + 1};
    }
  };

  [[nodiscard]] Range heads_of(int64_t kv_head) const {
    const int64_t global = shape_.kv_head_begin + kv_head;
    const int64_t begin = std::max(global * shape_.group - shape_.q_head_begin, int64_t{0});
    const int64_t end = std::min((global + 1) * shape_.group - shape_.q_head_begin, shape_.q_heads);
    return {begin, std::max(begin, end)};
  }

  [[nodiscard]] Rows rows_of(const AttentionItem& item) const {
    const SequenceSlice& s = sequences_[static_cast<size_t>(item.sequence)];
    const Range heads = heads_of(item.kv_head);
    return {.heads = heads.size(),
            .first_head = heads.begin,
            .first_token = s.token_begin + item.token_begin,
            .first_position = s.context - s.token_count + item.token_begin,
            .count = (item.token_end - item.token_begin) * heads.size(),
            .window = shape_.window};
  }

  // Blocks of rows, those with the longest way first; when there are too few to keep all threads
  // busy, their chunks are shared out as far as the memory for partial results goes.
  void plan() {
    scratch_.items.clear();
    for (size_t s = 0; s < sequences_.size(); ++s) {
      for (int64_t h = 0; h < kv_.kv_heads; ++h) {
        const int64_t heads = heads_of(h).size();
        if (heads == 0) continue;
        const int64_t tokens = scratch_.query_rows / heads;
        for (int64_t end = sequences_[s].token_count; end > 0; end -= tokens) {
          AttentionItem item{
              .sequence = static_cast<int32_t>(s),
              .kv_head = static_cast<int32_t>(h),
              .token_begin = static_cast<int32_t>(std::max(end - tokens, int64_t{0})),
              .token_end = static_cast<int32_t>(end)};
          const Range chunks = rows_of(item).chunks();
          item.chunk_begin = static_cast<int32_t>(chunks.begin);
          item.chunk_end = static_cast<int32_t>(chunks.end);
          scratch_.items.push_back(item);
        }
      }
    }
    const size_t blocks = scratch_.items.size();
    const int64_t threads = pool_.size();
    if (threads == 1) return;
    int64_t total = 0;
    for (const AttentionItem& block : scratch_.items) total += block.chunk_end - block.chunk_begin;
    const int64_t most = (total + 4 * threads - 1) / (4 * threads);
    int64_t used = 0;
    for (size_t i = 0; i < blocks; ++i) {
      const AttentionItem block = scratch_.items[i];
      const int64_t chunks = block.chunk_end - block.chunk_begin;
      const int64_t rows = rows_of(block).count;
      if (chunks <= most || used + rows * chunks > scratch_.max_partials) continue;
      for (int64_t c = 0; c < chunks; c += most) {
        AttentionItem item = block;
        item.chunk_begin = static_cast<int32_t>(block.chunk_begin + c);
        item.chunk_end =
            static_cast<int32_t>(std::min(block.chunk_begin + c + most, int64_t{block.chunk_end}));
        item.partial = used + c * rows;
        item.block_chunks = c == 0 ? static_cast<int32_t>(chunks) : 0;
        if (c == 0)
          scratch_.items[i] = item;
        else
          scratch_.items.push_back(item);
      }
      used += rows * chunks;
    }
  }

  [[nodiscard]] float* partial(int64_t index) const {
    return scratch_.partials + index * (padded_ + kLanes);
  }

  // Where position j of the sequence lies.
  struct Place {
    int64_t block = 0;
    int64_t offset = 0;
  };
  [[nodiscard]] Place place_of(const SequenceSlice& s, int64_t j) const {
    const int64_t block = s.block_table[j / kv_.block_size];
    PHALANX_CHECK(block >= 0 && block < kv_.blocks);
    return {block, j % kv_.block_size};
  }

  void gather_queries(const Rows& rows, int64_t kv_head, void* queries) const {
    const bool bf16 = qkv_.dtype == DType::kBF16;
    const auto in_bytes = static_cast<int64_t>(tensor::dtype_bytes(qkv_.dtype));
    const int64_t out_bytes = pairs_ ? 2 : 4;
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t at = (rows.first_token + r / rows.heads) * qkv_.stride +
                         (rows.first_head + r % rows.heads) * shape_.head_dim;
      const void* in = static_cast<const std::byte*>(qkv_.data) + at * in_bytes;
      void* out = static_cast<std::byte*>(queries) + r * shape_.head_dim * out_bytes;
      if (kv_.k_scale != nullptr)
        kernels_.scale(in, bf16, kv_.k_scale + kv_head * shape_.head_dim, shape_.head_dim, out,
                       pairs_);
      else
        kernels_.convert(in, bf16, shape_.head_dim, out, pairs_);
    }
  }

  // Keys and values of one chunk for the kernels: units of 16 positions, those of the keys, those
  // of the values, then what will be needed after them (for asking ahead only).
  struct Units {
    KvType type = KvType::kBF16;
    const std::byte* storage[5 * kChunkUnits];
    const std::byte** at = storage + kChunkUnits;
    int64_t count = 0;  // of the keys, and of the values
    int64_t first = 0;  // number of at[0] in the chunk
    int64_t ahead = 0;  // distance in units; 0: not to be asked for
    const float* key_scales = nullptr;
    const float* value_scales = nullptr;
  };

  // Units that hold positions `span` of a chunk.
  static Range units_of(Range span) {
    return {span.begin / kKvUnit, (span.end + kKvUnit - 1) / kKvUnit};
  }

  // Addresses of the units that hold `span`, as stored.
  int64_t stored_units(const AttentionItem& item, Range span, const std::byte* base,
                       const std::byte** out) const {
    const SequenceSlice& s = sequences_[static_cast<size_t>(item.sequence)];
    const Range units = units_of(span);
    const int64_t unit_bytes = kKvUnit * kv_.head_dim * element_;
    for (int64_t u = units.begin; u < units.end;) {
      const Place place = place_of(s, u * kKvUnit);
      const std::byte* at =
          base +
          (kv_head_index(kv_, place.block, item.kv_head) + place.offset * kv_.head_dim) * element_;
      const int64_t stop =
          std::min(units.end, u + (kv_.block_size - place.offset) / kKvUnit);  // of the block
      for (; u < stop; ++u, at += unit_bytes) *out++ = at;
    }
    return units.size();
  }

  // The keys of `units` as values.
  int64_t turned_units(const Units& units, const ThreadScratch& t, const std::byte** out) const {
    for (int64_t u = 0; u < units.count; ++u) {
      std::byte* values = t.values + u * kKvUnit * kv_.head_dim * element_;
      keys_as_values(units.type, units.at[u], kv_.head_dim, values);
      out[u] = values;
    }
    return units.count;
  }

  // Copies KV that is not stored in panels, and widens int8 for blocks of many rows.
  void unpack(const AttentionItem& item, Range span, bool widen, const ThreadScratch& t,
              Units& units) const {
    const SequenceSlice& s = sequences_[static_cast<size_t>(item.sequence)];
    units.type = widen ? KvType::kBF16 : type_of(kv_.dtype);
    const int64_t element = widen ? 2 : element_;
    const int64_t n = kv_.head_dim;
    const int64_t c0 = span.begin / kAttentionChunk * kAttentionChunk;
    const Range all = units_of(span);
    const int64_t key_unit = (n + n % 2) * kKvUnit;
    const int64_t value_unit = padded_ * kKvUnit;
    for (int64_t u = all.begin; u < all.end; ++u) {
      const int64_t slot = u - c0 / kKvUnit;
      std::byte* keys = t.keys + slot * key_unit * element;
      std::byte* values = t.values + slot * value_unit * element;
      units.at[u - all.begin] = keys;
      units.at[all.size() + u - all.begin] = values;
      if (in_panels_) {
        const Place place = place_of(s, u * kKvUnit);
        const int64_t at = kv_head_index(kv_, place.block, item.kv_head) + place.offset * n;
        kernels_.widen_i8(reinterpret_cast<const int8_t*>(kv_.k) + at, key_unit,
                          reinterpret_cast<uint16_t*>(keys));
        if (kv_.shared())
          keys_as_values(units.type, keys, n, values);
        else
          kernels_.widen_i8(reinterpret_cast<const int8_t*>(kv_.v) + at, value_unit,
                            reinterpret_cast<uint16_t*>(values));
        continue;
      }
      std::memset(keys, 0, static_cast<size_t>(key_unit * element));
      std::memset(values, 0, static_cast<size_t>(value_unit * element));
      for (int64_t j = std::max(u * kKvUnit, span.begin); j < std::min((u + 1) * kKvUnit, span.end);
           ++j) {
        const Place place = place_of(s, j);
        const int64_t at = kv_head_index(kv_, place.block, item.kv_head) + place.offset * n;
        const bool f32 = kv_.dtype == DType::kF32;
        for (int64_t i = 0; i < n; ++i) {
          std::memcpy(keys + key_panel_index(j % kKvUnit, i, n + n % 2, f32) * element_,
                      kv_.k + (at + i) * element_, static_cast<size_t>(element_));
          std::memcpy(values + value_panel_index(j % kKvUnit, i, padded_, f32) * element_,
                      kv_.v + (at + i) * element_, static_cast<size_t>(element_));
        }
      }
    }
  }

  void row_scales(const AttentionItem& item, Range span, const float* scales, float* out) const {
    const SequenceSlice& s = sequences_[static_cast<size_t>(item.sequence)];
    for (int64_t j = span.begin; j < span.end;) {
      const Place place = place_of(s, j);
      const int64_t count = std::min(kv_.block_size - place.offset, span.end - j);
      std::copy_n(scales + kv_scale_index(kv_, place.block, item.kv_head, place.offset), count,
                  out + j % kAttentionChunk);
      j += count;
    }
  }

  // next: whose keys follow, and its span; or nullptr.
  void find_units(const AttentionItem& item, Range span, int64_t rows, const AttentionItem* next,
                  Range next_span, const ThreadScratch& t, Units& units) const {
    const Range all = units_of(span);
    units.count = all.size();
    units.first = all.begin % kChunkUnits;
    units.ahead = 0;
    const bool widen = kv_.dtype == DType::kI8 && in_panels_ && rows > 2 * kTileRows;
    if (kv_.k_row_scale != nullptr) {
      row_scales(item, span, kv_.k_row_scale, t.key_scales);
      row_scales(item, span, kv_.v_row_scale, t.value_scales);
      units.key_scales = t.key_scales;
      units.value_scales = t.value_scales;
    }
    if (widen || !in_panels_) return unpack(item, span, widen, t, units);
    units.type = type_of(kv_.dtype);
    const std::byte** at = units.at;
    at += stored_units(item, span, kv_.k, at);
    if (kv_.shared())
      at += turned_units(units, t, at);
    else
      at += stored_units(item, span, kv_.v, at);
    units.ahead =
        std::clamp<int64_t>(kAheadBytes / (kKvUnit * kv_.head_dim * element_), 1, kChunkUnits);
    const std::byte** known = units.at + 2 * units.count;
    if (next != nullptr) known += stored_units(*next, next_span, kv_.k, known);
    // Where nothing is known: what is already there.
    while (known < units.at + 2 * units.count + units.ahead) *known++ = units.at[0];
  }

  // Scores of rows [row, row + count) for positions `span` of a chunk, in whole units.
  void score(const ThreadScratch& t, const Units& units, int64_t row, int64_t count,
             Range span) const {
    const Range own = units_of(span);
    const int64_t first = own.begin % kChunkUnits - units.first;
    kernels_.scores(
        {.type = units.type,
         .pairs = pairs_,
         .q = static_cast<const std::byte*>(t.queries) + row * shape_.head_dim * (pairs_ ? 2 : 4),
         .q_stride = shape_.head_dim,
         .rows = count,
         .units = units.at + first,
         .next = units.ahead > 0 ? units.at + first + units.ahead : nullptr,
         .count = own.size(),
         .k = shape_.head_dim,
         .s = t.scores + row * kAttentionChunk + (units.first + first) * kKvUnit,
         .s_stride = kAttentionChunk});
  }

  // (max, sum, output) of every row for chunk c.
  void run_chunk(const AttentionItem& item, const Rows& rows, int64_t c, Range span,
                 const AttentionItem* next, Range next_span, const ThreadScratch& t) const {
    const int64_t c0 = c * kAttentionChunk;
    Units units;
    find_units(item, span, rows.count, next, next_span, t, units);
    if (rows.seen(0, c) == rows.seen(rows.count - 1, c) && rows.seen(0, c).size() > 0) {
      score(t, units, 0, rows.count, span);
    } else {
      for (int64_t r = 0; r < rows.count; r += kTileRows) {
        const int64_t count = std::min(kTileRows, rows.count - r);
        const Range tile{std::max(span.begin, rows.seen(r, c).begin),
                         rows.seen(r + count - 1, c).end};
        if (tile.size() > 0) score(t, units, r, count, tile);
      }
    }
    for (int64_t r = 0; r < rows.count; ++r) {
      const Range own = rows.seen(r, c);
      t.begin[r] = static_cast<int32_t>(own.begin - c0);
      t.end[r] = static_cast<int32_t>(own.end - c0);
      float* s = t.scores + r * kAttentionChunk;
      if (own.size() > 0)
        kernels_.softmax(s, t.begin[r], t.end[r], shape_.scale, units.key_scales,
                         units.value_scales, s, pairs_, t.chunk_max + r, t.chunk_sum + r);
    }
    // at[i] of the values is unit `first + i`; the kernel counts from the chunk's beginning and
    // touches no unit before.
    const std::byte* const* values = units.at + units.count - units.first;
    kernels_.values({.type = units.type,
                     .pairs = pairs_,
                     .p = t.scores,
                     .p_stride = kAttentionChunk * (pairs_ ? 2 : 1),
                     .rows = rows.count,
                     .begin = t.begin,
                     .end = t.end,
                     .units = values,
                     .next = units.ahead > 0 ? values + units.ahead : nullptr,
                     .panels = padded_ / kLanes,
                     .o = t.chunk_out,
                     .o_stride = padded_});
  }

  void write(const Rows& rows, int64_t kv_head, int64_t r, const float* o, float sum) const {
    const int64_t at = (rows.first_token + r / rows.heads) * out_.stride +
                       (rows.first_head + r % rows.heads) * shape_.head_dim;
    const int64_t channel = kv_head * shape_.head_dim;
    kernels_.divide(o, sum, kv_.v_offset != nullptr ? kv_.v_offset + channel : nullptr,
                    kv_.v_scale != nullptr ? kv_.v_scale + channel : nullptr, shape_.head_dim,
                    static_cast<std::byte*>(out_.data) +
                        at * static_cast<int64_t>(tensor::dtype_bytes(out_.dtype)),
                    out_.dtype == DType::kBF16);
  }

  // What any of the rows sees of chunk c.
  static Range span_of(const Rows& rows, int64_t c) {
    const int64_t c0 = c * kAttentionChunk;
    return {std::max(rows.seen(0).begin, c0),
            std::min(rows.seen(rows.count - 1).end, c0 + kAttentionChunk)};
  }

  // after: what this thread does next, or nullptr.
  void run_item(const AttentionItem& item, const AttentionItem* after,
                const ThreadScratch& t) const {
    const Rows rows = rows_of(item);
    gather_queries(rows, item.kv_head, t.queries);
    for (int64_t c = item.chunk_begin; c < item.chunk_end; ++c) {
      const AttentionItem* next = c + 1 < item.chunk_end ? &item : after;
      Range next_span;
      if (next != nullptr)
        next_span =
            next == &item ? span_of(rows, c + 1) : span_of(rows_of(*next), next->chunk_begin);
      run_chunk(item, rows, c, span_of(rows, c), next, next_span, t);
      for (int64_t r = 0; r < rows.count; ++r) {
        if (rows.seen(r, c).size() == 0) continue;
        const float* o = t.chunk_out + r * padded_;
        if (item.partial >= 0) {
          float* p = partial(item.partial + (c - item.chunk_begin) * rows.count + r);
          std::copy_n(o, padded_, p);
          p[padded_] = t.chunk_max[r];
          p[padded_ + 1] = t.chunk_sum[r];
        } else if (rows.begins_in(r, c)) {
          std::copy_n(o, padded_, t.out + r * padded_);
          t.max[r] = t.chunk_max[r];
          t.sum[r] = t.chunk_sum[r];
        } else {
          kernels_.merge(t.max + r, t.sum + r, t.out + r * padded_, t.chunk_max[r], t.chunk_sum[r],
                         o, padded_);
        }
      }
    }
    if (item.partial < 0)
      for (int64_t r = 0; r < rows.count; ++r)
        write(rows, item.kv_head, r, t.out + r * padded_, t.sum[r]);
  }

  void merge_chunks(const AttentionItem& item) const {
    const Rows rows = rows_of(item);
    for (int64_t r = 0; r < rows.count; ++r) {
      float* all = nullptr;
      for (int64_t i = 0; i < item.block_chunks; ++i) {
        if (rows.seen(r, item.chunk_begin + i).size() == 0) continue;
        float* p = partial(item.partial + i * rows.count + r);
        if (all == nullptr)
          all = p;
        else
          kernels_.merge(all + padded_, all + padded_ + 1, all, p[padded_], p[padded_ + 1], p,
                         padded_);
      }
      write(rows, item.kv_head, r, all, all[padded_ + 1]);
    }
  }

  Context::Scratch& scratch_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  const MatrixView& qkv_;
  std::span<const SequenceSlice> sequences_;
  const AttentionShape& shape_;
  const KvLayer& kv_;
  const MatrixView& out_;
  const int64_t padded_;   // head_dim in whole lanes
  const bool pairs_;       // products by vdpbf16ps
  const bool in_panels_;   // the KV cache
  const int64_t element_;  // bytes of one of its elements
};

}  // namespace

void attention(Context& ctx, const MatrixView& qkv, std::span<const SequenceSlice> sequences,
               const AttentionShape& shape, const KvLayer& kv, const MatrixView& out) {
  Attention(ctx, qkv, sequences, shape, kv, out).run();
}

}  // namespace phalanx::ops::cpu
