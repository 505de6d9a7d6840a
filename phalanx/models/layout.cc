#include <fmt/format.h>

#include <numeric>

#include "phalanx/base/error.h"
#include "phalanx/models/model.h"

namespace phalanx::models {
namespace {

using tensor::Range;

// Experts, and rows of them, over moe_ep runs of ranks.
void cut_experts(const ModelInfo& info, std::span<const double> weights, int64_t moe_ep,
                 std::vector<RankLayout>& layout) {
  const size_t ranks = weights.size();
  const size_t run = ranks / static_cast<size_t>(moe_ep);
  std::vector<double> of_runs;
  for (size_t r = 0; r < ranks; r += run)
    of_runs.push_back(std::accumulate(weights.begin() + static_cast<long>(r),
                                      weights.begin() + static_cast<long>(r + run), 0.0));
  const auto experts = tensor::cut(info.experts.count, 1, of_runs);
  for (size_t r = 0; r < ranks; r += run) {
    const auto own = weights.subspan(r, run);
    const auto inner = tensor::cut(info.experts.intermediate_size, tensor::kPanelRows, own, true);
    const auto outer = tensor::cut(info.hidden_size, tensor::kPanelRows, own, true);
    for (size_t i = 0; i < run; ++i) {
      layout[r + i].experts = experts[r / run];
      layout[r + i].expert_rows = inner[i];
      layout[r + i].expert_outputs = outer[i];
    }
  }
  const auto shared =
      tensor::cut(info.experts.shared_intermediate_size, tensor::kPanelRows, weights, true);
  for (size_t r = 0; r < ranks; ++r) layout[r].shared_rows = shared[r];
}

void check(const ModelInfo& info, int64_t ranks, int64_t moe_ep) {
  const auto refuse = [](const std::string& what) {
    throw Error(Code::kInvalidArgument, what);
  };
  if (ranks > info.num_attention_heads)
    refuse(fmt::format("more ranks than can be fed: found {} ranks, expected at most {}, the "
                       "query heads of the model. Fix: start fewer ranks",
                       ranks, info.num_attention_heads));
  if (moe_ep == 1) return;
  if (info.experts.count == 0)
    refuse(fmt::format("moe_ep: found {} for a model of the family {} that has no experts, expected "
                       "1. Fix: leave moe_ep and moe_tp out",
                       moe_ep, info.model_type));
  if (moe_ep < 1 || ranks % moe_ep != 0)
    refuse(fmt::format("moe_ep: found {}, expected a divisor of the {} ranks", moe_ep, ranks));
  if (moe_ep > info.experts.count)
    refuse(fmt::format("moe_ep: found {}, expected at most {}, the experts of the model", moe_ep,
                       info.experts.count));
}

}  // namespace

std::vector<RankLayout> plan_layout(const ModelInfo& info, std::span<const double> weights,
                                    int64_t moe_ep) {
  check(info, static_cast<int64_t>(weights.size()), moe_ep);
  // Heads are the coarsest unit: what is left over of them goes to low ranks, that of the panels to
  // high ones, so that the two even out.
  const auto heads = tensor::cut(info.num_attention_heads, 1, weights);
  const auto hidden = tensor::cut(info.hidden_size, tensor::kPanelRows, weights, true);
  const auto mlp = tensor::cut(info.intermediate_size, tensor::kPanelRows, weights, true);
  const auto vocab = tensor::cut(info.vocab_size, tensor::kPanelRows, weights);
  const LatentAttention& latent = info.latent;
  const bool compressed = latent.kv_lora_rank > 0;
  const int64_t compressed_rows =
      compressed ? latent.q_lora_rank + latent.kv_lora_rank + latent.qk_rope_head_dim : 0;
  const auto compress = tensor::cut(compressed_rows, tensor::kPanelRows, weights, true);
  const int64_t group = info.num_attention_heads / info.num_key_value_heads;
  std::vector<RankLayout> layout;
  for (size_t r = 0; r < weights.size(); ++r)
    layout.push_back({.query_heads = heads[r],
                      .kv_heads = compressed ? Range{0, 1} : tensor::kv_heads_of(heads[r], group),
                      .hidden_rows = hidden[r],
                      .mlp_rows = mlp[r],
                      .vocab_rows = vocab[r],
                      .compressed_rows = compress[r]});
  if (info.experts.count > 0) cut_experts(info, weights, moe_ep, layout);
  return layout;
}

}  // namespace phalanx::models
