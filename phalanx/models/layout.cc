#include <fmt/format.h>

#include "phalanx/base/error.h"
#include "phalanx/models/model.h"

namespace phalanx::models {

std::vector<RankLayout> plan_layout(const ModelInfo& info, std::span<const double> weights) {
  const auto ranks = static_cast<int64_t>(weights.size());
  if (ranks > info.num_attention_heads)
    throw Error(Code::kInvalidArgument,
                fmt::format("more ranks than can be fed: found {} ranks, expected at most {}, the "
                            "query heads of the model. Fix: start fewer ranks",
                            ranks, info.num_attention_heads));
  // Heads are the coarsest unit: what is left over of them goes to low ranks, that of the panels to
  // high ones, so that the two even out.
  const auto heads = tensor::cut(info.num_attention_heads, 1, weights);
  const auto hidden = tensor::cut(info.hidden_size, tensor::kPanelRows, weights, true);
  const auto mlp = tensor::cut(info.intermediate_size, tensor::kPanelRows, weights, true);
  const auto vocab = tensor::cut(info.vocab_size, tensor::kPanelRows, weights);
  const int64_t group = info.num_attention_heads / info.num_key_value_heads;
  std::vector<RankLayout> layout;
  for (size_t r = 0; r < weights.size(); ++r)
    layout.push_back({.query_heads = heads[r],
                      .kv_heads = tensor::kv_heads_of(heads[r], group),
                      .hidden_rows = hidden[r],
                      .mlp_rows = mlp[r],
                      .vocab_rows = vocab[r]});
  return layout;
}

}  // namespace phalanx::models
