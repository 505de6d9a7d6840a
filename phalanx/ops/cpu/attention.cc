#include <algorithm>
#include <limits>

#include "phalanx/ops/cpu/cpu.h"
#include "phalanx/ops/cpu/kernels.h"
#include "phalanx/ops/packing.h"
#include "phalanx/ops/scratch.h"

namespace phalanx::ops::cpu {
namespace {

using tensor::Range;
constexpr int64_t kLanes = tensor::kPanelRows;

// One call of attention. A block of query rows of one KV head shares one packing of each chunk of
// keys and values; its rows are (token, head of the group), token by token. Rows differ in the
// positions they see, so products run over what all rows of a register tile see, and each row
// begins and ends on its own: no row reads a position that it must not see, not even times zero.
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
        pairs_(kernels_.pairs && qkv.dtype == DType::kBF16 && kv.dtype == DType::kBF16) {
    PHALANX_CHECK(shape.head_dim <= scratch_.max_head_dim && shape.q_heads <= scratch_.query_rows);
  }

  void run() {
    plan();
    scratch_.next_item.store(0, std::memory_order_relaxed);
    const auto count = static_cast<int64_t>(scratch_.items.size());
    bool shared = false;
    for (const AttentionItem& item : scratch_.items) shared |= item.partial >= 0;
    auto work = [&](int thread) {
      for (;;) {
        const int64_t i = scratch_.next_item.fetch_add(1, std::memory_order_relaxed);
        if (i >= count) return;
        run_item(scratch_.items[static_cast<size_t>(i)],
                 scratch_.threads[static_cast<size_t>(thread)]);
      }
    };
    if (count == 1)
      work(0);
    else
      pool_.run(work);
    if (shared)
      pool_.for_each(count, 1, [&](int64_t i) {
        const AttentionItem& item = scratch_.items[static_cast<size_t>(i)];
        if (item.siblings > 0) merge_siblings(item);
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
      const int64_t begin = std::max(all.begin, c * kAttentionChunk);
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
          AttentionItem item{.sequence = static_cast<int32_t>(s),
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
    const auto threads = static_cast<size_t>(pool_.size());
    if (threads == 1 || blocks >= 4 * threads) return;
    int64_t used = 0;
    for (size_t i = 0; i < blocks; ++i) {
      const AttentionItem block = scratch_.items[i];
      const int64_t chunks = block.chunk_end - block.chunk_begin;
      const int64_t rows = rows_of(block).count;
      if (chunks < 2 || used + rows * chunks > scratch_.max_partials) continue;
      for (int64_t c = 0; c < chunks; ++c) {
        AttentionItem item = block;
        item.chunk_begin = static_cast<int32_t>(block.chunk_begin + c);
        item.chunk_end = item.chunk_begin + 1;
        item.partial = used + c * rows;
        item.siblings = c == 0 ? static_cast<int32_t>(chunks) : 0;
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

  // Where position j of the sequence lies in kv.k and kv.v, in bytes.
  [[nodiscard]] int64_t offset_of(const SequenceSlice& s, int64_t kv_head, int64_t j) const {
    const int64_t block = s.block_table[j / kv_.block_size];
    PHALANX_CHECK(block >= 0 && block < kv_.blocks);
    return ((block * kv_.kv_heads + kv_head) * kv_.block_size + j % kv_.block_size) *
           kv_.head_dim * static_cast<int64_t>(tensor::dtype_bytes(kv_.dtype));
  }

  [[nodiscard]] int64_t key_panel_bytes() const {
    return panel_bytes(shape_.head_dim, pairs_ ? DType::kBF16 : DType::kF32);
  }

  void gather_queries(const Rows& rows, void* queries) const {
    const bool bf16 = qkv_.dtype == DType::kBF16;
    const auto in_bytes = static_cast<int64_t>(tensor::dtype_bytes(qkv_.dtype));
    const int64_t out_bytes = pairs_ ? 2 : 4;
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t at = (rows.first_token + r / rows.heads) * qkv_.stride +
                         (rows.first_head + r % rows.heads) * shape_.head_dim;
      kernels_.convert(static_cast<const std::byte*>(qkv_.data) + at * in_bytes, bf16,
                       shape_.head_dim,
                       static_cast<std::byte*>(queries) + r * shape_.head_dim * out_bytes, pairs_);
    }
  }

  // Positions `span` of one chunk, as far as any row sees them, while those up to `ahead_end` are
  // asked for kAhead positions before their turn, over the end of the chunk.
  void pack(const AttentionItem& item, Range span, int64_t ahead_end,
            const ThreadScratch& t) const {
    constexpr int64_t kAhead = 2 * kLanes;
    const SequenceSlice& s = sequences_[static_cast<size_t>(item.sequence)];
    const bool bf16 = kv_.dtype == DType::kBF16;
    const int64_t row_bytes = kv_.head_dim * static_cast<int64_t>(tensor::dtype_bytes(kv_.dtype));
    const int64_t c0 = span.begin / kAttentionChunk * kAttentionChunk;
    const int64_t first = span.begin / kLanes * kLanes;
    const int64_t end = (span.end + kLanes - 1) / kLanes * kLanes;
    const int64_t known = std::max(span.end, std::min(end + kAhead, ahead_end));
    const std::byte* keys[kAttentionChunk + kAhead];
    const std::byte* values[kAttentionChunk + kAhead];
    // Block by block of the paged cache.
    for (int64_t j = span.begin; j < known;) {
      const int64_t count = std::min(kv_.block_size - j % kv_.block_size, known - j);
      const int64_t offset = offset_of(s, item.kv_head, j);
      for (int64_t i = 0; i < count; ++i) {
        keys[j + i - first] = kv_.k + offset + i * row_bytes;
        values[j + i - first] = kv_.v + offset + i * row_bytes;
      }
      j += count;
    }
    for (int64_t j = first; j < end; j += kLanes) {
      const Range ahead{std::min(j + kAhead, known), std::min(j + kAhead + kLanes, known)};
      kernels_.prefetch_rows(keys + (ahead.begin - first), ahead.size(), row_bytes);
      kernels_.prefetch_rows(values + (ahead.begin - first), ahead.size(), row_bytes);
      const Range own{std::max(j, span.begin), std::min(j + kLanes, span.end)};
      kernels_.pack_values(values + (own.begin - first), bf16, own.size(), shape_.head_dim,
                           t.values + (own.begin - c0) * kLanes, kAttentionChunk * kLanes);
      const std::byte* panel[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        panel[i] = own.contains(j + i) ? keys[j + i - first] : nullptr;
      kernels_.pack_keys(panel, bf16, shape_.head_dim,
                         t.keys + (j - c0) / kLanes * key_panel_bytes(), pairs_);
    }
  }

  // scores of rows [row, row + count) for positions `span` of a chunk, in whole panels.
  void score(const ThreadScratch& t, int64_t row, int64_t count, Range span) const {
    const int64_t c0 = span.begin / kAttentionChunk * kAttentionChunk;
    const int64_t last = (span.end - c0 + kLanes - 1) / kLanes;
    for (int64_t p = (span.begin - c0) / kLanes; p < last; p += kGroupPanels) {
      const Product product{
          .x = static_cast<const std::byte*>(t.queries) + row * shape_.head_dim * (pairs_ ? 2 : 4),
          .x_stride = shape_.head_dim,
          .rows = count,
          .w = t.keys + p * key_panel_bytes(),
          .panel_stride = key_panel_bytes(),
          .panels = std::min(kGroupPanels, last - p),
          .k = shape_.head_dim,
          .c = t.scores + row * kAttentionChunk + p * kLanes,
          .c_stride = kAttentionChunk};
      (pairs_ ? kernels_.multiply_bf16 : kernels_.multiply_f32)(product);
    }
  }

  // chunk_out (+)= weights * values over positions `span`.
  void weigh(const ThreadScratch& t, int64_t row, int64_t count, Range span,
             bool accumulate) const {
    const int64_t c0 = span.begin / kAttentionChunk * kAttentionChunk;
    const int64_t panels = padded_ / kLanes;
    for (int64_t p = 0; p < panels; p += kGroupPanels) {
      kernels_.multiply_f32(
          {.x = t.scores + row * kAttentionChunk + (span.begin - c0),
           .x_stride = kAttentionChunk,
           .rows = count,
           .w = reinterpret_cast<const std::byte*>(t.values + p * kAttentionChunk * kLanes +
                                                   (span.begin - c0) * kLanes),
           .panel_stride = kAttentionChunk * kLanes * 4,
           .panels = std::min(kGroupPanels, panels - p),
           .k = span.size(),
           .c = t.chunk_out + row * padded_ + p * kLanes,
           .c_stride = padded_,
           .accumulate = accumulate});
    }
  }

  // Rows that see different positions: what they share in one product, the rest one by one.
  void weigh_ragged(const ThreadScratch& t, const Rows& rows, int64_t row, int64_t count,
                    int64_t c) const {
    Range common = rows.seen(row, c);
    for (int64_t r = row; r < row + count; ++r) {
      common.begin = std::max(common.begin, rows.seen(r, c).begin);
      common.end = std::min(common.end, rows.seen(r, c).end);
    }
    std::fill_n(t.chunk_out + row * padded_, count * padded_, 0.0f);
    const bool any = common.size() > 0;
    for (int64_t r = row; r < row + count; ++r) {
      const Range own = rows.seen(r, c);
      const Range head{own.begin, any ? common.begin : own.end};
      if (head.size() > 0) weigh(t, r, 1, head, true);
    }
    if (!any) return;
    weigh(t, row, count, common, true);
    for (int64_t r = row; r < row + count; ++r) {
      const Range tail{common.end, rows.seen(r, c).end};
      if (tail.size() > 0) weigh(t, r, 1, tail, true);
    }
  }

  // (max, sum, output) of every row for chunk c.
  void run_chunk(const AttentionItem& item, const Rows& rows, int64_t c,
                 const ThreadScratch& t) const {
    const Range first = rows.seen(0, c);
    const Range last = rows.seen(rows.count - 1, c);
    const int64_t c0 = c * kAttentionChunk;
    const Range span{std::min(std::max(rows.seen(0).begin, c0), c0 + kAttentionChunk), last.end};
    pack(item, span, rows.seen(rows.count - 1).end, t);
    const bool same = first == last && first.size() > 0;
    if (same) {
      score(t, 0, rows.count, span);
    } else {
      for (int64_t r = 0; r < rows.count; r += kTileRows) {
        const int64_t count = std::min(kTileRows, rows.count - r);
        const Range tile{std::max(span.begin, rows.seen(r, c).begin),
                         rows.seen(r + count - 1, c).end};
        if (tile.size() > 0) score(t, r, count, tile);
      }
    }
    for (int64_t r = 0; r < rows.count; ++r) {
      const Range own = rows.seen(r, c);
      if (own.size() > 0)
        kernels_.softmax(t.scores + r * kAttentionChunk, own.begin - c0, own.end - c0,
                         shape_.scale, t.chunk_max + r, t.chunk_sum + r);
    }
    if (same) {
      weigh(t, 0, rows.count, span, false);
    } else {
      for (int64_t r = 0; r < rows.count; r += kTileRows)
        weigh_ragged(t, rows, r, std::min(kTileRows, rows.count - r), c);
    }
  }

  void write(const Rows& rows, int64_t r, const float* o, float sum) const {
    const int64_t at = (rows.first_token + r / rows.heads) * out_.stride +
                       (rows.first_head + r % rows.heads) * shape_.head_dim;
    kernels_.divide(o, sum, shape_.head_dim,
                    static_cast<std::byte*>(out_.data) +
                        at * static_cast<int64_t>(tensor::dtype_bytes(out_.dtype)),
                    out_.dtype == DType::kBF16);
  }

  void run_item(const AttentionItem& item, const ThreadScratch& t) const {
    const Rows rows = rows_of(item);
    gather_queries(rows, t.queries);
    for (int64_t c = item.chunk_begin; c < item.chunk_end; ++c) {
      run_chunk(item, rows, c, t);
      for (int64_t r = 0; r < rows.count; ++r) {
        if (rows.seen(r, c).size() == 0) continue;
        const float* o = t.chunk_out + r * padded_;
        if (item.partial >= 0) {
          float* p = partial(item.partial + r);
          std::copy_n(o, padded_, p);
          p[padded_] = t.chunk_max[r];
          p[padded_ + 1] = t.chunk_sum[r];
        } else if (rows.begins_in(r, c)) {
          std::copy_n(o, padded_, t.out + r * padded_);
          t.max[r] = t.chunk_max[r];
          t.sum[r] = t.chunk_sum[r];
        } else {
          kernels_.merge(t.max + r, t.sum + r, t.out + r * padded_, t.chunk_max[r],
                         t.chunk_sum[r], o, padded_);
        }
      }
    }
    if (item.partial < 0)
      for (int64_t r = 0; r < rows.count; ++r) write(rows, r, t.out + r * padded_, t.sum[r]);
  }

  void merge_siblings(const AttentionItem& item) const {
    const Rows rows = rows_of(item);
    for (int64_t r = 0; r < rows.count; ++r) {
      float* all = nullptr;
      for (int64_t i = 0; i < item.siblings; ++i) {
        if (rows.seen(r, item.chunk_begin + i).size() == 0) continue;
        float* p = partial(item.partial + i * rows.count + r);
        if (all == nullptr)
          all = p;
        else
          kernels_.merge(all + padded_, all + padded_ + 1, all, p[padded_], p[padded_ + 1], p,
                         padded_);
      }
      write(rows, r, all, all[padded_ + 1]);
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
  const int64_t padded_;  // head_dim in whole lanes
  const bool pairs_;      // scores by vdpbf16ps
};

}  // namespace

void attention(Context& ctx, const MatrixView& qkv, std::span<const SequenceSlice> sequences,
               const AttentionShape& shape, const KvLayer& kv, const MatrixView& out) {
  Attention(ctx, qkv, sequences, shape, kv, out).run();
}

}  // namespace phalanx::ops::cpu
