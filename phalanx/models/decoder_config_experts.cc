// The keys of experts and of MLA that several families share.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "phalanx/models/decoder_config.h"
#include "phalanx/ops/head_rows.h"

namespace phalanx::models {
namespace {

constexpr int64_t kMaxStep = 1 << 14;

}  // namespace

void read_experts(const ConfigReader& reader, DecoderConfig& config, std::string_view count_key,
                  std::string_view per_token_key) {
  Experts& experts = config.info.experts;
  // transformers 5 writes num_local_experts for every family.
  constexpr std::string_view kCommon = "num_local_experts";
  if (!reader.has(count_key) && reader.has(kCommon)) count_key = kCommon;
  experts.count = reader.integer(count_key, 1, ops::kMaxExperts);
  experts.per_token = reader.integer(per_token_key, 1, ops::kMaxExperts);
  if (experts.per_token > experts.count) {
    reader.refuse(per_token_key, "more experts for a token than there are",
                  fmt::format("at most {}, {}", experts.count, count_key));
    experts.per_token = experts.count;
  }
  experts.intermediate_size = reader.integer("moe_intermediate_size", 1, kMaxWidth);
  experts.in_layer.assign(static_cast<size_t>(config.info.num_layers), true);
}

void read_dense_before(const ConfigReader& reader, DecoderConfig& config) {
  const int64_t first = reader.integer("first_k_dense_replace", 0, kMaxStep, 0);
  const int64_t step = reader.integer("moe_layer_freq", 1, kMaxStep, 1);
  auto& in_layer = config.info.experts.in_layer;
  for (size_t i = 0; i < in_layer.size(); ++i)
    in_layer[i] = static_cast<int64_t>(i) >= first && static_cast<int64_t>(i) % step == 0;
}

void read_sparse_steps(const ConfigReader& reader, DecoderConfig& config) {
  const int64_t step = reader.integer("decoder_sparse_step", 1, kMaxStep, 1);
  auto& in_layer = config.info.experts.in_layer;
  const std::vector<int64_t> dense =
      reader.integers("mlp_only_layers", 0, std::max<int64_t>(0, config.info.num_layers - 1));
  for (size_t i = 0; i < in_layer.size(); ++i) {
    const auto layer = static_cast<int64_t>(i);
    in_layer[i] = (layer + 1) % step == 0 &&
                  std::find(dense.begin(), dense.end(), layer) == dense.end();
  }
}

void read_expert_groups(const ConfigReader& reader, DecoderConfig& config) {
  const Experts& experts = config.info.experts;
  ops::RoutingRule& rule = config.routing;
  rule.groups = reader.integer("n_group", 1, experts.count, 1);
  rule.open_groups = reader.integer("topk_group", 1, rule.groups, 1);
  if (experts.count % rule.groups != 0) {
    reader.refuse("n_group", "does not divide the experts",
                  fmt::format("a divisor of {}", experts.count));
  } else if (experts.count / rule.groups * rule.open_groups < experts.per_token) {
    reader.refuse("topk_group", "fewer open experts than a token wants",
                  fmt::format("groups that hold at least {} experts", experts.per_token));
  } else {
    return;
  }
  rule.groups = rule.open_groups = 1;
}

void read_shared_experts(const ConfigReader& reader, DecoderConfig& config) {
  Experts& experts = config.info.experts;
  experts.shared_intermediate_size =
      experts.intermediate_size * reader.integer("n_shared_experts", 1, kMaxWidth, 0);
}

void read_corrected_experts(const ConfigReader& reader, DecoderConfig& config) {
  read_experts(reader, config, "n_routed_experts", "num_experts_per_tok");
  read_dense_before(reader, config);
  read_expert_groups(reader, config);
  read_shared_experts(reader, config);
  config.info.experts.correction_bias = true;
  config.routing.score = ops::RoutingRule::Score::kSigmoid;
  config.routing.group_score = ops::RoutingRule::GroupScore::kBestTwo;
  config.routing.normalise = reader.boolean("norm_topk_prob", true);
  config.routing.scale =
      static_cast<float>(reader.number("routed_scaling_factor", 0.0, 1e6, 1.0));
}

void read_latent(const ConfigReader& reader, DecoderConfig& config) {
  ModelInfo& info = config.info;
  LatentAttention& latent = info.latent;
  latent.q_lora_rank = reader.integer("q_lora_rank", 1, kMaxWidth, 0);
  latent.kv_lora_rank = reader.integer("kv_lora_rank", 1, kMaxWidth);
  latent.qk_nope_head_dim = reader.integer("qk_nope_head_dim", 1, kMaxWidth);
  latent.qk_rope_head_dim = reader.integer("qk_rope_head_dim", 2, kMaxWidth);
  latent.v_head_dim = reader.integer("v_head_dim", 1, kMaxWidth);
  latent.bias = reader.boolean("attention_bias", false);
  if (latent.qk_rope_head_dim % 2 != 0)
    reader.refuse("qk_rope_head_dim", "odd rotary dimensions", "an even number");
  const int64_t row = latent.kv_lora_rank + latent.qk_rope_head_dim;
  if (row > ops::kMaxHeadWidth || latent.qk_nope_head_dim > ops::kMaxHeadWidth)
    reader.refuse(row > ops::kMaxHeadWidth ? "kv_lora_rank" : "qk_nope_head_dim",
                  "wider than the kernels take",
                  fmt::format("kv_lora_rank + qk_rope_head_dim and qk_nope_head_dim of at most {}",
                              ops::kMaxHeadWidth));
  info.output_bias = latent.bias;
  // The cache holds one row per token that all heads share.
  info.num_key_value_heads = 1;
  info.head_dim = row;
  const double width =
      static_cast<double>(latent.qk_nope_head_dim + latent.qk_rope_head_dim);
  config.attention_scale = 1.0 / std::sqrt(width);
  auto scaling = reader.object("rope_parameters");
  if (!scaling) scaling = reader.object("rope_scaling");
  if (!scaling || config.rotary.type == layers::RotaryConfig::Type::kDefault) return;
  const double all_dim = scaling->number("mscale_all_dim", 0.0, 1e6, 0.0);
  if (all_dim == 0) return;
  const double mscale = layers::yarn_mscale(config.rotary.factor, all_dim);
  config.attention_scale *= mscale * mscale;
}

}  // namespace phalanx::models
