#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <numbers>

#include "phalanx/layers/kv_cache.h"
#include "phalanx/layers/memory.h"
#include "phalanx/layers/rotary.h"
#include "phalanx/layers/weight_plan.h"
#include "phalanx/layers/widen.h"

namespace phalanx::layers {
namespace {

TEST(Rotary, Frequencies) {
  const auto plain = inverse_frequencies({.theta = 10000.0, .rotary_dim = 8});
  ASSERT_EQ(plain.size(), 4U);
  EXPECT_EQ(plain[0], 1.0F);
  EXPECT_NEAR(plain[1], 0.1, 1e-8);
  EXPECT_NEAR(plain[3], 0.001, 1e-9);
  const auto linear = inverse_frequencies({.type = RotaryConfig::Type::kLinear,
                                           .theta = 10000.0,
                                           .factor = 4.0,
                                           .rotary_dim = 8});
  EXPECT_NEAR(linear[1], 0.025, 1e-8);
  // LLaMA 3.1: wave lengths below 8192 / 4 are kept, above 8192 / 1 divided by 8, others between.
  const auto llama3 = inverse_frequencies({.type = RotaryConfig::Type::kLlama3,
                                           .theta = 500000.0,
                                           .factor = 8.0,
                                           .low_freq_factor = 1.0,
                                           .high_freq_factor = 4.0,
                                           .original_max_position_embeddings = 8192,
                                           .rotary_dim = 128});
  const auto base = inverse_frequencies({.theta = 500000.0, .rotary_dim = 128});
  int kept = 0;
  int between = 0;
  int divided = 0;
  for (size_t i = 0; i < base.size(); ++i) {
    const double wavelength = 2.0 * std::numbers::pi / base[i];
    if (wavelength < 2048.0) {
      EXPECT_EQ(llama3[i], base[i]);
      ++kept;
    } else if (wavelength > 8192.0) {
      EXPECT_EQ(llama3[i], base[i] / 8.0F);
      ++divided;
    } else {
      EXPECT_LT(llama3[i], base[i]);
      EXPECT_GT(llama3[i], base[i] / 8.0F);
      ++between;
    }
  }
  EXPECT_EQ(kept + between + divided, 64);
  EXPECT_GT(between, 3);
}

TEST(Rotary, YarnKeepsShortWavesAndDividesLongOnes) {
  // DeepSeek V3: 4096 positions times 40.
  const RotaryConfig config{.type = RotaryConfig::Type::kYarn,
                            .theta = 10000.0,
                            .factor = 40.0,
                            .original_max_position_embeddings = 4096,
                            .rotary_dim = 64};
  const auto yarn = inverse_frequencies(config);
  const auto plain = inverse_frequencies({.theta = 10000.0, .rotary_dim = 64});
  for (size_t i = 0; i < 10; ++i) EXPECT_EQ(yarn[i], plain[i]) << i;
  EXPECT_LT(yarn[15], plain[15]);
  EXPECT_GT(yarn[15], plain[15] / 40.0F);
  for (size_t i = 23; i < 32; ++i) EXPECT_NEAR(yarn[i], plain[i] / 40.0F, plain[i] * 1e-8) << i;
  EXPECT_NEAR(yarn_mscale(40.0, 1.0), 1.36888794541, 1e-10);
  EXPECT_EQ(yarn_mscale(0.5, 1.0), 1.0);
}

TEST(Rotary, DynamicAnglesFollowFromThePosition) {
  const RotaryConfig config{.type = RotaryConfig::Type::kDynamic,
                            .theta = 10000.0,
                            .factor = 2.0,
                            .original_max_position_embeddings = 16,
                            .rotary_dim = 8};
  const auto plain = inverse_frequencies({.theta = 10000.0, .rotary_dim = 8});
  EXPECT_EQ(inverse_frequencies(config, 16), plain);
  const auto longer = inverse_frequencies(config, 32);
  // theta * (2 * 32 / 16 - 1)^(8 / 6)
  EXPECT_NEAR(longer[1], std::pow(10000.0 * std::pow(3.0, 8.0 / 6.0), -0.25), 1e-7);
  const ops::RopeTable table = rope_table(config, 40);
  ASSERT_EQ(table.positions, 40);
  EXPECT_EQ(table.cos[15 * 4 + 1], ops::make_rope_table(plain, 16, 1.0F).cos[15 * 4 + 1]);
  EXPECT_EQ(table.cos[31 * 4 + 1], ops::make_rope_table(longer, 32, 1.0F).cos[31 * 4 + 1]);
}

TEST(WeightPlan, TwoPlansOfOneOrderGiveOnePlacement) {
  const auto declare = [](WeightPlan& plan) {
    std::vector<const void*> places;
    places.push_back(plan.vector({{"norm", 30, 0, {0, 30}}}));
    places.push_back(plan.linear({{"q", 40, 30, {10, 20}}, {"k", 20, 30, {0, 10}}}).data);
    places.push_back(plan.gated({"g", 50, 30, {0, 17}}, {"u", 50, 30, {0, 17}}).panels.data);
    places.push_back(plan.rows({"e", 100, 30, {16, 32}}).data);
    places.push_back(plan.linear({{"none", 40, 30, {40, 40}}}).data);
    return places;
  };
  WeightPlan measured(DType::kF32, ops::Isa::kRef);
  for (const void* place : declare(measured)) EXPECT_EQ(place, nullptr);
  EXPECT_EQ(measured.arena_bytes() % 64, 0);
  // 30 of the norm, 20 + 34 + 16 rows of 30.
  EXPECT_EQ(measured.read_bytes(), 4 * (30 + (20 + 34 + 16) * 30));
  Memory memory(measured.arena_bytes(), "test");
  WeightPlan placed(DType::kF32, ops::Isa::kRef, memory.data());
  const auto places = declare(placed);
  EXPECT_EQ(placed.arena_bytes(), measured.arena_bytes());
  EXPECT_EQ(places[0], memory.data());
  for (size_t i = 1; i < places.size(); ++i) EXPECT_GT(places[i], places[i - 1]);
  EXPECT_EQ(static_cast<const std::byte*>(places.back()), memory.data() + memory.bytes());
}

TEST(KvCache, LayersDoNotOverlap) {
  const KvCache::Shape shape{.layers = 3, .kv_heads = 2, .head_dim = 10, .block_size = 16};
  EXPECT_EQ(shape.bytes_per_block(), 3 * 2 * 2 * 10 * 16 * 2);
  const KvCache cache(shape, 5);
  const int64_t half = 5 * 2 * 10 * 16 * 2;
  for (int64_t i = 0; i < 3; ++i) {
    EXPECT_EQ(cache.layer(i).v, cache.layer(i).k + half);
    if (i > 0) {
      EXPECT_EQ(cache.layer(i).k, cache.layer(i - 1).v + half);
    }
  }
  cache.layer(2).v[half - 1] = std::byte{1};
}

TEST(KvCache, KeysThatAreValuesAreStoredOnce) {
  const KvCache::Shape shape{.layers = 3, .kv_heads = 1, .head_dim = 10, .block_size = 16,
                             .dtype = DType::kI8, .shared = true, .row_scales = true};
  EXPECT_EQ(shape.bytes_per_block(), 3 * (10 + 4) * 16);
  const KvCache cache(shape, 5);
  for (int64_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(cache.layer(i).shared());
    EXPECT_EQ(cache.layer(i).v_row_scale, cache.layer(i).k_row_scale);
    if (i > 0) {
      EXPECT_GE(cache.layer(i).k, cache.layer(i - 1).k + 5 * 10 * 16);
      EXPECT_GE(cache.layer(i).k, reinterpret_cast<std::byte*>(cache.layer(i - 1).k_row_scale) + 5 * 64);
    }
  }
}

TEST(Memory, SaysHowMuchWasRefused) {
  try {
    const Memory memory(int64_t{1} << 60, "the moon");
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::kResourceExhausted);
    EXPECT_NE(std::string(e.what()).find("1152921504606846976 bytes for the moon"),
              std::string::npos);
  }
}

TEST(Widen, IsExact) {
  const std::array<uint16_t, 2> halves = {0x3f80, 0xc000};
  std::array<float, 2> out{};
  widen(reinterpret_cast<const std::byte*>(halves.data()), DType::kBF16, 2, out.data());
  EXPECT_EQ(out[0], 1.0F);
  EXPECT_EQ(out[1], -2.0F);
  widen(reinterpret_cast<const std::byte*>(halves.data()), DType::kF16, 2, out.data());
  EXPECT_EQ(out[1], -2.0F);
  EXPECT_EQ(out[0], 1.875F);
}

}  // namespace
}  // namespace phalanx::layers
