#include "phalanx/ops/quantised.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "phalanx/ops/packing.h"
#include "phalanx/ops/ref/ref.h"
#include "phalanx/ops/test_data.h"

namespace phalanx::ops {
namespace {

using quant::Storage;

struct Layer {
  Storage storage = Storage::kInt8;
  int64_t group = 0;  // 0: all of k
  bool zeros = false;
  bool static_input = false;
  bool order = false;
};

std::string name_of(const Layer& l) {
  const char* names[] = {"float", "int8", "codes4", "codes8", "fp8"};
  return std::string(names[static_cast<int>(l.storage)]) +
         (l.group != 0 ? "_g" + std::to_string(l.group) : "") + (l.zeros ? "_zeros" : "") +
         (l.static_input ? "_static" : "") + (l.order ? "_order" : "");
}

quant::Rows random_rows(const Layer& layer, int64_t n, int64_t k, uint32_t seed) {
  std::mt19937 random(seed);
  const int64_t group = layer.group == 0 ? k : layer.group;
  const int64_t groups = (k + group - 1) / group;
  quant::Rows rows{.storage = layer.storage, .rows = n, .k = k, .group = group};
  for (int64_t i = 0; i < n * k; ++i) {
    auto code = static_cast<uint8_t>(random());
    if (layer.storage == Storage::kCodes4) code &= 15;
    if (layer.storage == Storage::kCodesFp8 && (code & 127) == 127) code = 0;
    rows.codes.push_back(code);
  }
  const auto number = [&](float least, float most) {
    return least + (most - least) * static_cast<float>(random() % 4096) / 4095.0f;
  };
  for (int64_t i = 0; i < n * groups; ++i) rows.scale.push_back(number(0.001f, 0.02f));
  const bool zeros = layer.zeros || layer.storage == Storage::kCodes8;
  if (zeros)
    for (int64_t i = 0; i < n * groups; ++i)
      rows.zero.push_back(layer.zeros ? std::nearbyint(number(-6, 6)) + 0.5f : 0.5f);
  if (layer.storage == Storage::kInt8)
    for (int64_t i = 0; i < n; ++i)
      rows.add.push_back(static_cast<int32_t>(random() % 2000) - 1000);
  return rows;
}

struct Packed {
  Packed(const Layer& layer, const quant::Rows& rows, DType dtype, Isa isa) {
    w = {.rows = rows.rows, .k = rows.k, .dtype = dtype, .isa = isa, .storage = rows.storage,
         .group = rows.group, .zeros = !rows.zero.empty() && rows.storage != Storage::kInt8};
    if (layer.static_input) w.input = input;
    if (layer.order) {
      for (int64_t i = 0; i < rows.k; ++i) order.push_back(static_cast<int32_t>(i));
      std::shuffle(order.begin(), order.end(), std::mt19937(5));
      w.order = order.data();
    }
    memory = std::make_unique<Aligned>(packed_bytes(w));
    // In pieces, as the loader does it.
    for (int64_t row = 0; row < rows.rows; row += 48)
      pack_quantised(piece(rows, row, std::min<int64_t>(48, rows.rows - row)), row, rows.rows, w, 1,
                     0, memory->data());
    w.data = memory->data();
  }
  static quant::Rows piece(const quant::Rows& rows, int64_t begin, int64_t count) {
    const int64_t groups = static_cast<int64_t>(rows.scale.size()) / rows.rows;
    quant::Rows out = rows;
    out.rows = count;
    const auto cut = [&](auto& v, int64_t per_row) {
      if (v.empty()) return;
      v.erase(v.begin(), v.begin() + begin * per_row);
      v.resize(static_cast<size_t>(count * per_row));
    };
    cut(out.codes, rows.k);
    cut(out.scale, groups);
    cut(out.zero, groups);
    cut(out.add, 1);
    return out;
  }
  float input[2] = {0.02f, 3.0f};
  std::vector<int32_t> order;
  std::unique_ptr<Aligned> memory;
  PackedLinear w;
};

const Layer kLayers[] = {
    {.storage = Storage::kInt8},
    {.storage = Storage::kInt8, .zeros = true},
    {.storage = Storage::kInt8, .static_input = true},
    {.storage = Storage::kCodes8},
    {.storage = Storage::kCodes8, .group = 32, .zeros = true},
    {.storage = Storage::kCodes4, .group = 32},
    {.storage = Storage::kCodes4, .group = 128, .zeros = true},
    {.storage = Storage::kCodes4, .zeros = true, .order = true},
    {.storage = Storage::kCodesFp8, .group = 128},
};

class Quantised : public testing::TestWithParam<std::tuple<Isa, Layer, DType>> {
 protected:
  Isa isa() const { return std::get<0>(GetParam()); }
  const Layer& layer() const { return std::get<1>(GetParam()); }
  DType act() const { return std::get<2>(GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(AllPaths, Quantised,
                         testing::Combine(testing::ValuesIn(available_isas()),
                                          testing::ValuesIn(kLayers),
                                          testing::Values(DType::kBF16, DType::kF32)),
                         [](const auto& info) {
                           return std::string(isa_name(std::get<0>(info.param))) + "_" +
                                  name_of(std::get<1>(info.param)) + "_" +
                                  std::string(tensor::dtype_name(std::get<2>(info.param)));
                         });

struct QuantisedRunner {
  QuantisedRunner(Isa isa, int threads)
      : pool({.threads = threads, .spin_us = 5}),
        ctx({.isa = isa, .max_tokens = 600, .max_k = 2048, .max_rows = 512, .quantised = true},
            pool) {}
  ThreadPool pool;
  Context ctx;
};

// The formula in double precision; for kInt8 with the reference's own x_q.
TEST_P(Quantised, AgreesWithTheFormula) {
  for (const int64_t k : {24, 70, 256, 1000}) {
    if (layer().group != 0 && k % 16 != 0 && layer().storage != Storage::kCodesFp8) continue;
    const int64_t n = 37;
    const quant::Rows rows = random_rows(layer(), n, k, 3);
    const Packed packed(layer(), rows, act(), isa());
    const Matrix x = random_matrix(act(), 3, k, 4, 1.0f, k + 5);
    const Matrix bias = random_matrix(DType::kF32, 1, n, 5);
    Matrix out(DType::kF32, 3, n);
    QuantisedRunner runner(isa(), 2);
    linear(runner.ctx, x.view(), packed.w, bias.view().row<float>(0), out.view());
    std::vector<float> weights(static_cast<size_t>(n * k));
    quant::dequantize(rows, packed.order, weights.data());
    const int64_t groups = static_cast<int64_t>(rows.scale.size()) / n;
    for (int64_t t = 0; t < 3; ++t) {
      float largest = 0;
      for (int64_t i = 0; i < k; ++i) largest = std::max(largest, std::fabs(x.get(t, i)));
      const bool int8 = layer().storage == Storage::kInt8;
      const float s = layer().static_input ? packed.input[0] : largest / 127.0f;
      for (int64_t r = 0; r < n; ++r) {
        double sum = 0;
        double magnitude = 1;
        for (int64_t i = 0; i < k; ++i) {
          double value = x.get(t, i);
          if (int8) {
            value = std::nearbyint(x.get(t, i) / s);
            if (layer().static_input) value += packed.input[1];
            value = std::clamp(value, -128.0, 127.0) * (layer().static_input ? 1.0 : s);
          }
          sum += value * weights[static_cast<size_t>(r * k + i)];
          magnitude += std::fabs(value * weights[static_cast<size_t>(r * k + i)]);
        }
        if (int8)
          sum += static_cast<double>(rows.add[static_cast<size_t>(r)]) *
                 (layer().static_input ? 1.0 : s) * rows.scale[static_cast<size_t>(r)];
        (void)groups;
        ASSERT_NEAR(out.get(t, r), sum + bias.get(0, r), 2e-6 * std::sqrt(k) * magnitude)
            << "k " << k << ", token " << t << ", row " << r;
      }
    }
  }
}

TEST_P(Quantised, GivesTheBitsOfItsClass) {
  struct Shape {
    int64_t n, k;
  };
  for (const Shape s : {Shape{1, 16}, {40, 70}, {200, 576}, {72, 1408}}) {
    if (layer().group != 0 && s.k % 16 != 0 && layer().storage != Storage::kCodesFp8) continue;
    if (isa() == Isa::kRef && s.n > 100) continue;
    const quant::Rows rows = random_rows(layer(), s.n, s.k, 6);
    const Packed packed(layer(), rows, act(), isa());
    const int64_t most = s.n > 100 ? 40 : s.n > 1 ? 66 : 512;
    const Matrix x = random_matrix(act(), most, s.k, 7, 1.0f, s.k + 1);
    const Matrix bias = random_matrix(DType::kF32, 1, s.n, 8);
    Matrix expected(act(), most, s.n, s.n);
    ref::linear_quantised(x.view(), packed.w, bias.view().row<float>(0), expected.view(),
                          numeric_class_of(isa()));
    for (const int threads : {1, 3}) {
      QuantisedRunner runner(isa(), threads);
      for (const int64_t m : {int64_t{1}, int64_t{2}, int64_t{4}, int64_t{7}, int64_t{32}, most}) {
        if (isa() == Isa::kRef && m > 2) continue;
        Matrix out(act(), m, s.n, s.n + 9);
        const Matrix before = out;
        linear(runner.ctx, x.view().rows_of(most - m, m), packed.w, bias.view().row<float>(0),
               out.view());
        for (int64_t t = 0; t < m; ++t) {
          ASSERT_EQ(out.row_bits(t), expected.row_bits(most - m + t))
              << s.n << " x " << s.k << ", m " << m << ", token " << t << ", threads " << threads;
          for (int64_t i = s.n; i < s.n + 9 && t + 1 < m; ++i)
            ASSERT_EQ(out.get(t, i), before.get(t, i));
        }
      }
    }
  }
}

TEST_P(Quantised, GatedGivesTheBitsOfItsClass) {
  const int64_t n = 88;
  const int64_t k = 192;
  const quant::Rows gate = random_rows(layer(), n, k, 9);
  const quant::Rows up = random_rows(layer(), n, k, 10);
  const Packed gate_packed(layer(), gate, act(), isa());
  const Packed up_packed(layer(), up, act(), isa());
  PackedGated w{.panels = gate_packed.w, .rows = n};
  w.panels.rows = 2 * panels_of(n) * 16;
  Aligned memory(packed_bytes(w.panels));
  pack_quantised(gate, 0, n, w.panels, 2, 0, memory.data());
  pack_quantised(up, 0, n, w.panels, 2, 1, memory.data());
  w.panels.data = memory.data();
  PackedGated halves{.rows = n, .halves = {gate_packed.w, up_packed.w}};
  halves.halves[1].input = halves.halves[0].input;
  halves.halves[1].order = halves.halves[0].order;
  const Matrix x = random_matrix(act(), 40, k, 11);
  const Matrix biases = random_matrix(DType::kF32, 2, n, 12);
  const float* b = biases.view().row<float>(0);
  Matrix expected(act(), 40, n);
  ref::gated_quantised(x.view(), w, b, b + n, expected.view(), numeric_class_of(isa()));
  QuantisedRunner runner(isa(), 2);
  for (const int64_t m : {1, 2, 7, 40}) {
    if (isa() == Isa::kRef && m > 2) continue;
    for (const PackedGated& either : {w, halves}) {
      Matrix out(act(), m, n, n + 3);
      gated_linear(runner.ctx, x.view().rows_of(0, m), either, b, b + n, out.view());
      for (int64_t t = 0; t < m; ++t)
        ASSERT_EQ(out.row_bits(t), expected.row_bits(t)) << "m " << m << ", token " << t;
    }
  }
}

TEST_P(Quantised, BadNumbersStayInTheirRow) {
  const quant::Rows rows = random_rows(layer(), 40, 96, 14);
  const Packed packed(layer(), rows, act(), isa());
  Matrix x = random_matrix(act(), 9, 96, 15);
  QuantisedRunner runner(isa(), 2);
  Matrix clean(act(), 9, 40);
  linear(runner.ctx, x.view(), packed.w, nullptr, clean.view());
  x.set(4, 3, std::numeric_limits<float>::quiet_NaN());
  x.set(6, 95, std::numeric_limits<float>::infinity());
  Matrix out(act(), 9, 40);
  linear(runner.ctx, x.view(), packed.w, nullptr, out.view());
  for (int64_t t = 0; t < 9; ++t) {
    if (t != 4 && t != 6) {
      EXPECT_EQ(out.row_bits(t), clean.row_bits(t)) << t;
      continue;
    }
    int64_t finite = 0;
    for (int64_t i = 0; i < 40; ++i) finite += std::isfinite(out.get(t, i)) ? 1 : 0;
    // A weight of zero times NaN is the only way to stay finite, and few weights are zero.
    EXPECT_LT(finite, 10) << t;
  }
  // A token of zeros has no scale of its own.
  Matrix zeros(act(), 1, 96);
  for (int64_t i = 0; i < 96; ++i) zeros.set(0, i, 0);
  Matrix result(DType::kF32, 1, 40);
  linear(runner.ctx, zeros.view(), packed.w, nullptr, result.view());
  for (int64_t i = 0; i < 40; ++i) EXPECT_TRUE(std::isfinite(result.get(0, i)));
}

TEST(QuantisedTables, HoldEveryValueExactly) {
  for (const Storage storage : {Storage::kCodes4, Storage::kCodes8, Storage::kCodesFp8}) {
    for (int code = 0; code < (storage == Storage::kCodes4 ? 16 : 256); ++code) {
      const float v = quant::value_of(storage, static_cast<uint8_t>(code));
      if (std::isnan(v)) continue;
      EXPECT_EQ(tensor::bf16_to_f32(tensor::f32_to_bf16(v)), v) << code;
      EXPECT_EQ(tensor::f16_to_f32(tensor::f32_to_f16(v)), v) << code;
    }
  }
  for (int q = -128; q < 128; ++q)
    EXPECT_EQ(quant::value_of(Storage::kCodes8, quant::code_of_int8(static_cast<int8_t>(q))),
              static_cast<float>(q) + quant::kCodes8Zero);
}

}  // namespace
}  // namespace phalanx::ops
