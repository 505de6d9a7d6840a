#include "phalanx/layers/vocab.h"

#include <algorithm>
#include <cstring>

#include "phalanx/layers/widen.h"

namespace phalanx::layers {
Vocab::Vocab(WeightPlan& plan, const Shape& shape, std::span<const Range> cut, DType dtype,
             int64_t max_tokens, int rank)
    : cut_(cut.begin(), cut.end()),
      rank_(rank),
      dtype_(dtype),
      hidden_(shape.hidden),
      row_bytes_(shape.hidden * static_cast<int64_t>(tensor::dtype_bytes(dtype))),
      tied_(shape.tied),
      columns_(cut, 1, DType::kF32, rank),
      place_(static_cast<size_t>(max_tokens)),
      next_(cut.size()),
      exchanged_bytes_(cut.size()) {
  const Range take = cut[static_cast<size_t>(rank)];
  if (!tied_) embedding_ = plan.rows({shape.embedding, shape.vocab, shape.hidden, take});
  head_ = plan.linear({{tied_ ? shape.embedding : shape.head, shape.vocab, shape.hidden, take}});
  if (!shape.bias.empty()) bias_ = plan.vector({{shape.bias, shape.vocab, 0, take}});
}

void Vocab::embed(ops::Context& ctx, comm::Group& group, std::span<const int32_t> tokens,
                  std::byte* exchange, const MatrixView& out) {
  PHALANX_CHECK(tokens.size() <= place_.size());
  const auto owner_of = [&](int32_t token) {
    const auto after = std::upper_bound(cut_.begin(), cut_.end(), static_cast<int64_t>(token),
                                        [](int64_t t, const Range& r) { return t < r.end; });
    PHALANX_CHECK(token >= 0 && after != cut_.end());
    return static_cast<size_t>(after - cut_.begin());
  };
  // The exchange holds the tokens sorted by owner, otherwise in the order of the step.
  std::fill(exchanged_bytes_.begin(), exchanged_bytes_.end(), 0);
  for (const int32_t token : tokens) exchanged_bytes_[owner_of(token)] += row_bytes_;
  int64_t begin = 0;
  for (size_t r = 0; r < cut_.size(); ++r) {
    next_[r] = begin;
    begin += exchanged_bytes_[r] / row_bytes_;
  }
  for (size_t t = 0; t < tokens.size(); ++t)
    place_[t] = static_cast<int32_t>(next_[owner_of(tokens[t])]++);

  const Range own = cut_[static_cast<size_t>(rank_)];
  const auto count = static_cast<int64_t>(tokens.size());
  constexpr int64_t kGrain = 8;
  ctx.pool().for_each(count, kGrain, [&](int64_t t) {
    const int32_t token = tokens[static_cast<size_t>(t)];
    if (!own.contains(token)) return;
    std::byte* to = exchange + place_[static_cast<size_t>(t)] * row_bytes_;
    if (tied_)
      ops::unpack_row(head_, token - own.begin, to);
    else
      std::memcpy(to, embedding_.rows_of(token - own.begin, 1).data,
                  static_cast<size_t>(row_bytes_));
  });
  group.all_gather(exchange, 1, exchanged_bytes_);
  ctx.pool().for_each(count, kGrain, [&](int64_t t) {
    widen(exchange + place_[static_cast<size_t>(t)] * row_bytes_, dtype_, hidden_,
          out.row<float>(t));
  });
}

void Vocab::head(ops::Context& ctx, comm::Group& group, const MatrixView& x,
                 const MatrixView& logits) const {
  if (head_.rows > 0)
    ops::linear(ctx, x, head_, bias_, rank_ == 0 ? columns_.own(logits) : logits);
  columns_.gather_to_first(group, logits);
}

}  // namespace phalanx::layers
