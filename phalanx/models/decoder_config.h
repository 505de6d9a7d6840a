#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "phalanx/layers/rotary.h"
#include "phalanx/models/config_reader.h"
#include "phalanx/models/model.h"
#include "phalanx/ops/moe.h"

namespace phalanx::models {

// A decoder of pre-norm layers: RMS norm, rotary attention, gated MLP or experts.
struct DecoderConfig {
  ModelInfo info;
  float rms_norm_eps = 1e-6F;
  layers::RotaryConfig rotary;
  double attention_scale = 0;    // of the scores
  std::vector<int64_t> windows;  // sliding window of each layer in positions, 0 = none
  ops::RoutingRule routing;      // to the experts, if any
};

inline constexpr int64_t kMaxWidth = 1 << 22;
inline constexpr int64_t kMaxPositions = 1 << 28;

// What a family takes where its config.json says nothing.
struct DecoderDefaults {
  int64_t head_dim = 0;  // 0: hidden_size / num_attention_heads
  double rope_theta = 10000.0;
  double partial_rotary_factor = 1.0;
  double rms_norm_eps = 1e-6;
  bool tied_embeddings = false;
};

// The keys that all families share. Biases, norms of q and k, windows and experts are the family's.
[[nodiscard]] DecoderConfig read_decoder(const ConfigReader& config,
                                         const DecoderDefaults& defaults = {});

// rope_theta beside rope_scaling (until transformers 4), or both in rope_parameters (since 5), for
// heads of which `head_dim` values may rotate.
[[nodiscard]] layers::RotaryConfig read_rotary(const ConfigReader& config,
                                               const DecoderDefaults& defaults, int64_t head_dim);

// The experts: their count and number per token under these keys, their width under
// moe_intermediate_size. The layers are the family's.
void read_experts(const ConfigReader& reader, DecoderConfig& config, std::string_view count_key,
                  std::string_view per_token_key);
// Experts in the layers from first_k_dense_replace on, every moe_layer_freq-th.
void read_dense_before(const ConfigReader& reader, DecoderConfig& config);
// Experts in every decoder_sparse_step-th layer but those of mlp_only_layers.
void read_sparse_steps(const ConfigReader& reader, DecoderConfig& config);
// n_group and topk_group.
void read_expert_groups(const ConfigReader& reader, DecoderConfig& config);
// The shared expert is as wide as n_shared_experts routed ones.
void read_shared_experts(const ConfigReader& reader, DecoderConfig& config);
// All keys of experts chosen by sigmoid scores with a correction, groups by their best two (DeepSeek V3).
void read_corrected_experts(const ConfigReader& reader, DecoderConfig& config);
// MLA: the ranks and head widths, and the scale of the scores with yarn's mscale_all_dim.
void read_latent(const ConfigReader& reader, DecoderConfig& config);

// The window of all layers.
void set_window(DecoderConfig& config, int64_t window);
// The windows of the Qwen families: layer_types, or else the layers from max_window_layers on, where
// use_sliding_window is true.
void read_qwen_windows(const ConfigReader& reader, DecoderConfig& config);

}  // namespace phalanx::models
