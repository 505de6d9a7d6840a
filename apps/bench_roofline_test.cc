#include "apps/bench_roofline.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace phalanx::apps {
namespace {

models::ModelInfo dense() {
  return {.num_layers = 3,
          .hidden_size = 64,
          .intermediate_size = 160,
          .num_attention_heads = 4,
          .num_key_value_heads = 2,
          .head_dim = 16,
          .vocab_size = 100,
          .tied_embeddings = true};
}

constexpr double kAttention = 64 * 16 * (4 + 4 + 2 + 2);  // q, o, k and v of a layer

TEST(Roofline, ADenseModelReadsAllItsWeights) {
  models::ModelInfo info = dense();
  const double elements = 3 * (kAttention + 3 * 64 * 160) + 64 * 100;
  info.parameter_bytes = static_cast<int64_t>(2 * elements);
  const double kv = kv_bytes_per_position(info, models::KvDtype::kBf16);
  EXPECT_EQ(kv, 3 * 2 * 2 * 16 * 2);  // layers, keys and values, heads, channels, bytes
  const StepWork work = decode_work(info, kv, 5, 7);
  EXPECT_EQ(work.bytes, 2 * elements + 5 * 7 * kv);
  EXPECT_EQ(work.flops, 5 * (2 * elements + 7 * 3 * 4 * 4 * 16));
  info.tied_embeddings = false;  // then a table is left unread
  EXPECT_EQ(decode_work(info, kv, 1, 0).bytes, 2 * (elements - 64 * 100));
}

TEST(Roofline, IdleExpertsAreNotCounted) {
  models::ModelInfo info = dense();
  info.experts = {.count = 8, .per_token = 2, .intermediate_size = 32,
                  .shared_intermediate_size = 48, .in_layer = {false, true, true}};
  const double expert = 3 * 64 * 32;
  const double always =
      3 * kAttention + 3 * 64 * 160 + 2 * (64 * 8 + 3 * 64 * 48) + 64 * 100;
  info.parameter_bytes = static_cast<int64_t>(2 * (always + 2 * 8 * expert));
  const StepWork one = decode_work(info, 0, 1, 0);
  EXPECT_DOUBLE_EQ(one.bytes, 2 * (always + 2 * 2 * expert));
  EXPECT_DOUBLE_EQ(one.flops, 2 * (always + 2 * 2 * expert));
  // Two tokens meet 2 + 2 * 6 / 8 experts of a layer if each is as likely as the others.
  EXPECT_DOUBLE_EQ(decode_work(info, 0, 2, 0).bytes, 2 * (always + 2 * 3.5 * expert));
  EXPECT_NEAR(prefill_work(info, 1, 1000).bytes, 2 * (always + 2 * 8 * expert), 1);

  quant::Formats formats;
  formats.linears["model.layers.1.mlp.experts.0.down_proj"] = {
      .scheme = quant::Scheme::kCtPacked, .storage = quant::Storage::kCodes4, .bits = 4,
      .group = 32, .scale_dtype = tensor::DType::kBF16};
  info.formats = std::make_shared<const quant::Formats>(formats);
  const double element = 0.5 + 2.0 / 32;
  info.parameter_bytes = static_cast<int64_t>(2 * always + 2 * 8 * expert * element);
  EXPECT_DOUBLE_EQ(decode_work(info, 0, 1, 0).bytes, 2 * always + 2 * 2 * expert * element);
}

TEST(Roofline, LatentAttentionReadsOneRowPerPosition) {
  models::ModelInfo info = dense();
  info.num_key_value_heads = 1;
  info.head_dim = 32 + 8;
  info.latent = {.q_lora_rank = 24, .kv_lora_rank = 32, .qk_nope_head_dim = 16,
                 .qk_rope_head_dim = 8, .v_head_dim = 16};
  EXPECT_EQ(kv_bytes_per_position(info, models::KvDtype::kBf16), 3 * (32 + 8) * 2);
  const double attention = 24 * (64 + 4 * 24) + 64 * (32 + 8) + 32 * 4 * (16 + 16) + 4 * 16 * 64;
  const StepWork work = decode_work(info, 0, 1, 10);
  EXPECT_EQ(work.flops, 2 * (3 * (attention + 3 * 64 * 160) + 64 * 100) +
                            10 * 3 * 4 * 2 * (32 + 8 + 32));
}

}  // namespace
}  // namespace phalanx::apps
