#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "phalanx/ops/kv_layout.h"
#include "phalanx/ops/ref/ref.h"
#include "phalanx/ops/test_data.h"

namespace phalanx::ops {
namespace {

class Rows : public testing::TestWithParam<Isa> {};
INSTANTIATE_TEST_SUITE_P(AllPaths, Rows, testing::ValuesIn(available_isas()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

TEST_P(Rows, NormGivesOneSetOfBits) {
  for (const int64_t h : {1, 8, 17, 72, 576, 2048}) {
    const int64_t tokens = 40;
    const Matrix x = random_matrix(DType::kF32, tokens, h, 1, 3.0f, h + 2);
    const Matrix weight = random_matrix(DType::kF32, 1, h, 2);
    const Matrix delta = random_matrix(DType::kBF16, tokens, h, 3, 1.0f, h + 1);
    const Matrix biases = random_matrix(DType::kF32, 1, h, 6);
    for (const auto& [act, biased] : {std::pair(DType::kBF16, false), std::pair(DType::kF32, false),
                                      std::pair(DType::kBF16, true), std::pair(DType::kF32, true)}) {
      const float* bias = biased ? biases.view().row<const float>(0) : nullptr;
      Matrix expected(act, tokens, h);
      ref::rms_norm(x.view(), weight.view().row<float>(0), 1e-5f, bias, expected.view());
      Matrix residual = x;
      ref::add(residual.view(), delta.view());
      Matrix expected_sum(act, tokens, h);
      ref::rms_norm(residual.view(), weight.view().row<float>(0), 1e-5f, bias, expected_sum.view());
      for (const int threads : {1, 3}) {
        Runner runner(GetParam(), threads);
        for (const int64_t m : {int64_t{1}, int64_t{3}, tokens}) {
          Matrix out(act, m, h, h + 4);
          rms_norm(runner.ctx, x.view().rows_of(0, m), weight.view().row<float>(0), 1e-5f,
                   out.view(), bias);
          Matrix sum = x;
          Matrix out_sum(act, m, h);
          add_rms_norm(runner.ctx, sum.view().rows_of(0, m), delta.view().rows_of(0, m),
                       weight.view().row<float>(0), 1e-5f, out_sum.view(), bias);
          Matrix only_sum = x;
          add(runner.ctx, only_sum.view().rows_of(0, m), delta.view().rows_of(0, m));
          EXPECT_EQ(sum.bits(), only_sum.bits());
          for (int64_t t = 0; t < m; ++t) {
            ASSERT_EQ(out.row_bits(t), expected.row_bits(t)) << h << ", token " << t;
            ASSERT_EQ(out_sum.row_bits(t), expected_sum.row_bits(t)) << h << ", token " << t;
            ASSERT_EQ(sum.row_bits(t), residual.row_bits(t)) << h << ", token " << t;
          }
        }
      }
    }
  }
}

TEST_P(Rows, NormAgreesWithDoublePrecision) {
  const int64_t h = 100;
  const Matrix x = random_matrix(DType::kF32, 3, h, 4, 5.0f);
  const Matrix weight = random_matrix(DType::kF32, 1, h, 5);
  const Matrix bias = random_matrix(DType::kF32, 1, h, 6);
  Matrix out(DType::kF32, 3, h);
  Runner runner(GetParam(), 1);
  rms_norm(runner.ctx, x.view(), weight.view().row<float>(0), 1e-5f, out.view(),
           bias.view().row<float>(0));
  for (int64_t t = 0; t < 3; ++t) {
    double squares = 0;
    for (int64_t i = 0; i < h; ++i) squares += static_cast<double>(x.get(t, i)) * x.get(t, i);
    const double scale = 1 / std::sqrt(squares / h + 1e-5);
    for (int64_t i = 0; i < h; ++i)
      EXPECT_NEAR(out.get(t, i), x.get(t, i) * scale * weight.get(0, i) + bias.get(0, i), 1e-6);
  }
}

TEST_P(Rows, RoundsToBf16AsTheScalarFunctionDoes) {
  // Through add: residual 0 + delta, then a norm is not needed; linear's epilogue is tested apart.
  std::vector<float> values = {0.0f,
                               -0.0f,
                               1.0f,
                               1.00390625f,
                               1.01171875f,
                               3.3895314e38f,
                               3.4028235e38f,
                               1e-40f,
                               -1e-45f,
                               std::numeric_limits<float>::infinity(),
                               -std::numeric_limits<float>::infinity()};
  std::mt19937 random(6);
  while (values.size() < 3000) {
    const float f = std::bit_cast<float>(static_cast<uint32_t>(random()));
    if (!std::isnan(f)) values.push_back(f);
  }
  // rope with an angle of zero copies and rounds.
  const auto n = static_cast<int64_t>(values.size() / 6 * 6);
  Runner runner(GetParam(), 1);
  const RopeTable rope{.rotary_dim = 0, .positions = 1};
  const int64_t head_dim = n / 3;
  Matrix qkv(DType::kF32, 1, n);
  for (int64_t i = 0; i < n; ++i) qkv.set(0, i, values[static_cast<size_t>(i)]);
  Matrix k(DType::kBF16, 1, head_dim);
  Matrix v(DType::kBF16, 1, head_dim);
  const KvLayer kv{.k = static_cast<std::byte*>(k.view().data),
                   .v = static_cast<std::byte*>(v.view().data),
                   .dtype = DType::kBF16,
                   .blocks = 1,
                   .block_size = 1,
                   .kv_heads = 1,
                   .head_dim = head_dim};
  const int32_t zero[1] = {0};
  rope_and_store(runner.ctx, qkv.view(), 1, rope, zero, zero, kv);
  for (int64_t i = 0; i < head_dim; ++i) {
    EXPECT_EQ(k.view().row<uint16_t>(0)[i],
              tensor::f32_to_bf16(values[static_cast<size_t>(head_dim + i)]));
    EXPECT_EQ(v.view().row<uint16_t>(0)[i],
              tensor::f32_to_bf16(values[static_cast<size_t>(2 * head_dim + i)]));
  }
}

TEST_P(Rows, RopeGivesOneSetOfBits) {
  for (const int64_t head_dim : {8, 12, 64, 80, 96, 128}) {
    for (const int64_t rotary : {head_dim, head_dim / 4 * 2}) {
      std::vector<float> inv_freq;
      for (int64_t i = 0; i < rotary / 2; ++i)
        inv_freq.push_back(std::pow(10000.0F, -2.0F * static_cast<float>(i) / rotary));
      const RopeTable rope = make_rope_table(inv_freq, 300, 1.0F);
      const int64_t q_heads = 3;
      const int64_t kv_heads = 2;
      const int64_t tokens = 33;
      std::vector<int32_t> positions;
      std::vector<int32_t> slots;
      for (int32_t t = 0; t < tokens; ++t) {
        positions.push_back(t * 9);
        slots.push_back((t * 7) % 36);
      }
      struct Kind {
        DType dtype;
        bool dynamic = false;
        bool offsets = false;
      };
      const Matrix scales = random_matrix(DType::kF32, 4, kv_heads * head_dim, 8, 0.1f);
      const auto scale = [&](int64_t r) { return scales.view().row<float>(r); };
      for (int64_t i = 0; i < kv_heads * head_dim; ++i)
        for (int64_t r = 0; r < 2; ++r) scale(r)[i] = std::fabs(scale(r)[i]) + 0.005f;
      for (const DType act : {DType::kBF16, DType::kF32}) {
        for (const Kind kind : {Kind{DType::kBF16},
                                {DType::kF32},
                                {DType::kI8},
                                {DType::kI8, false, true},
                                {DType::kI8, true}}) {
          // In rows and in panels.
          const int64_t block_size = act == DType::kBF16 ? 4 : 16;
          const int64_t blocks = 36 / block_size + 1;
          auto run = [&](auto f) {
            Matrix qkv = random_matrix(act, tokens, (q_heads + 2 * kv_heads) * head_dim, 7, 2.0f);
            qkv.set(3, (q_heads + 1) * head_dim + 2, std::numeric_limits<float>::quiet_NaN());
            qkv.set(4, (q_heads + kv_heads) * head_dim + 5, 1e30f);
            for (int64_t i = 0; i < head_dim; ++i) qkv.set(5, q_heads * head_dim + i, 0);
            Matrix k(kind.dtype, blocks * kv_heads * block_size, head_dim);
            Matrix v(kind.dtype, blocks * kv_heads * block_size, head_dim);
            Matrix own(DType::kF32, 2, blocks * kv_heads * block_size);
            KvLayer kv{.k = static_cast<std::byte*>(k.view().data),
                       .v = static_cast<std::byte*>(v.view().data),
                       .dtype = kind.dtype,
                       .blocks = blocks,
                       .block_size = block_size,
                       .kv_heads = kv_heads,
                       .head_dim = head_dim};
            if (kind.dynamic) {
              kv.k_row_scale = own.view().row<float>(0);
              kv.v_row_scale = own.view().row<float>(1);
            } else if (kind.dtype == DType::kI8) {
              kv.k_scale = scale(0);
              kv.v_scale = scale(1);
            }
            if (kind.offsets) {
              kv.k_offset = scale(2);
              kv.v_offset = scale(3);
            }
            f(qkv.view(), kv);
            return std::tuple(qkv.bits(), k.bits(), v.bits(), own.bits());
          };
          const auto expected = run([&](const MatrixView& qkv, const KvLayer& kv) {
            ref::rope_and_store(qkv, q_heads, rope, positions, slots, kv);
          });
          for (const int threads : {1, 2}) {
            Runner runner(GetParam(), threads);
            EXPECT_EQ(run([&](const MatrixView& qkv, const KvLayer& kv) {
                        rope_and_store(runner.ctx, qkv, q_heads, rope, positions, slots, kv);
                      }),
                      expected)
                << head_dim << ", rotary " << rotary << ", " << tensor::dtype_name(kind.dtype);
            EXPECT_EQ(run([&](const MatrixView& qkv, const KvLayer& kv) {
                        for (int64_t t = 0; t < tokens; ++t)
                          rope_and_store(runner.ctx, qkv.rows_of(t, 1), q_heads, rope,
                                         std::span(positions).subspan(t, 1),
                                         std::span(slots).subspan(t, 1), kv);
                      }),
                      expected)
                << head_dim << ", one by one";
          }
        }
      }
    }
  }
}

// int8: half to even, clamped, NaN to 0; a row of zeros has the scale 0.
TEST_P(Rows, Int8CacheRoundsAsDocumented) {
  const int64_t d = 16;
  const std::vector<float> k = {0.5f,  1.5f,   2.5f,    -0.5f,
                                -1.5f, 300.0f, -300.0f, std::numeric_limits<float>::quiet_NaN()};
  const std::vector<int8_t> rounded = {0, 2, 2, 0, -2, 127, -128, 0};
  const RopeTable none = make_rope_table({}, 4, 1.0);
  Matrix qkv(DType::kF32, 1, 3 * d);
  for (int64_t i = 0; i < 3 * d; ++i) qkv.set(0, i, i >= d && i < d + 8 ? k[i - d] : 0.0f);
  std::vector<int8_t> keys(256), values(256);
  const std::vector<float> ones(static_cast<size_t>(d), 1.0f);
  std::vector<float> own(32);
  KvLayer kv{.k = reinterpret_cast<std::byte*>(keys.data()),
             .v = reinterpret_cast<std::byte*>(values.data()),
             .dtype = DType::kI8,
             .blocks = 1,
             .block_size = 16,
             .kv_heads = 1,
             .head_dim = d,
             .k_scale = ones.data(),
             .v_scale = ones.data()};
  const int32_t at[1] = {3};
  Runner runner(GetParam(), 1);
  rope_and_store(runner.ctx, qkv.view(), 1, none, at, at, kv);
  for (int64_t i = 0; i < 8; ++i)
    EXPECT_EQ(keys[static_cast<size_t>(kv_key_index(kv, 0, 0, 3, i))],
              rounded[static_cast<size_t>(i)])
        << i;
  kv.k_scale = kv.v_scale = nullptr;
  kv.k_row_scale = own.data();
  kv.v_row_scale = own.data() + 16;
  own[19] = 1;
  rope_and_store(runner.ctx, qkv.view(), 1, none, at, at, kv);
  EXPECT_EQ(own[3], 300.0f / 127.0f);
  EXPECT_EQ(keys[static_cast<size_t>(kv_key_index(kv, 0, 0, 3, 6))], -127);
  EXPECT_EQ(own[19], 0.0f);
}

TEST(Rope, TableAgreesWithLibm) {
  const std::vector<float> inv_freq = {1.0F, 0.7071F, 0.1F, 1e-3F, 1e-6F};
  const RopeTable table = make_rope_table(inv_freq, 140'000, 1.25F);
  ASSERT_EQ(table.rotary_dim, 10);
  for (int64_t p = 0; p < table.positions; p += p < 1000 ? 1 : 331) {
    for (size_t i = 0; i < inv_freq.size(); ++i) {
      const auto angle = static_cast<double>(static_cast<float>(p) * inv_freq[i]);
      const size_t at = static_cast<size_t>(p) * inv_freq.size() + i;
      ASSERT_NEAR(table.cos[at], std::cos(angle) * 1.25, 1e-7) << p;
      ASSERT_NEAR(table.sin[at], std::sin(angle) * 1.25, 1e-7) << p;
    }
  }
}

}  // namespace
}  // namespace phalanx::ops
