#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "phalanx/base/sanitizer.h"
#include "phalanx/ops/packing.h"
#include "phalanx/ops/ref/ref.h"
#include "phalanx/ops/test_data.h"

namespace phalanx::ops {
namespace {

struct Packed {
  Packed(const Matrix& source, Isa isa)
      : memory(packed_bytes(source.view().rows, source.view().cols, source.view().dtype, isa)) {
    const MatrixView& v = source.view();
    // In pieces, as the loader does it.
    for (int64_t row = 0; row < v.rows; row += 48)
      pack_rows(v.rows_of(row, std::min<int64_t>(48, v.rows - row)), row, v.rows, memory.data(),
                isa);
    w = {.data = memory.data(), .rows = v.rows, .k = v.cols, .dtype = v.dtype, .isa = isa};
  }
  Aligned memory;
  PackedLinear w;
};

struct PackedPair {
  PackedPair(const Matrix& gate, const Matrix& up, Isa isa)
      : memory(packed_gated_bytes(gate.view().rows, gate.view().cols, gate.view().dtype, isa)) {
    const MatrixView& v = gate.view();
    pack_gated_rows(gate.view(), 0, v.rows, 0, memory.data(), isa);
    pack_gated_rows(up.view(), 0, v.rows, 1, memory.data(), isa);
    w = {.panels = {.data = memory.data(), .rows = 2 * panels_of(v.rows) * 16, .k = v.cols,
                    .dtype = v.dtype, .isa = isa},
         .rows = v.rows};
  }
  Aligned memory;
  PackedGated w;
};

DType input_of(DType weights) { return weights == DType::kBF16 ? DType::kBF16 : DType::kF32; }

class Linear : public testing::TestWithParam<std::tuple<Isa, DType>> {
 protected:
  Isa isa() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
  DType act() const { return input_of(dtype()); }
  NumericClass numeric_class() const { return numeric_class_of(isa()); }
};

std::string name_of(const testing::TestParamInfo<std::tuple<Isa, DType>>& info) {
  return std::string(isa_name(std::get<0>(info.param))) + "_" +
         std::string(tensor::dtype_name(std::get<1>(info.param)));
}
INSTANTIATE_TEST_SUITE_P(AllPaths, Linear,
                         testing::Combine(testing::ValuesIn(available_isas()),
                                          testing::Values(DType::kBF16, DType::kF16, DType::kF32)),
                         name_of);

TEST_P(Linear, RowsComeBackAsStored) {
  for (const int64_t k : {1, 8, 17, 72}) {
    const Matrix source = random_matrix(dtype(), 41, k, 1, 1.0f, k + 3);
    const Packed packed(source, isa());
    std::vector<std::byte> row(static_cast<size_t>(k) * tensor::dtype_bytes(dtype()));
    for (int64_t r = 0; r < 41; ++r) {
      unpack_row(packed.w, r, row.data());
      ASSERT_EQ(row, source.row_bits(r)) << "row " << r << ", k " << k;
    }
  }
}

TEST_P(Linear, AgreesWithSumsInDoublePrecision) {
  for (const int64_t k : {8, 17, 72, 576, 1000}) {
    const int64_t n = 50;
    const Matrix w = random_matrix(dtype(), n, k, 2);
    const Matrix x = random_matrix(act(), 7, k, 3, 1.0f, k + 5);
    const Matrix bias = random_matrix(DType::kF32, 1, n, 4);
    const Packed packed(w, isa());
    Matrix out(DType::kF32, 7, n);
    Runner runner(isa(), 2);
    linear(runner.ctx, x.view(), packed.w, bias.view().row<float>(0), out.view());
    for (int64_t t = 0; t < 7; ++t) {
      for (int64_t i = 0; i < n; ++i) {
        double sum = 0;
        double magnitude = 0;
        for (int64_t j = 0; j < k; ++j) {
          sum += static_cast<double>(w.get(i, j)) * x.get(t, j);
          magnitude += std::fabs(static_cast<double>(w.get(i, j)) * x.get(t, j));
        }
        ASSERT_NEAR(out.get(t, i), sum + bias.get(0, i), 1e-7 * std::sqrt(k) * (magnitude + 1))
            << t << ", " << i << ", k " << k;
      }
    }
  }
}

// The oracle of the class, by memory, for every number of tokens, threads and strides.
TEST_P(Linear, GivesTheBitsOfItsClass) {
  struct Shape {
    int64_t n, k;
  };
  for (const Shape s : {Shape{1, 8}, {16, 17}, {40, 72}, {200, 576}, {72, 1000}, {48, 2048 + 70}}) {
    if (s.k > 2048 && isa() == Isa::kRef) continue;
    const Matrix w = random_matrix(dtype(), s.n, s.k, 5);
    const Packed packed(w, isa());
    const int64_t most = s.n * s.k > 100'000 ? 66 : 512;
    const Matrix x = random_matrix(act(), most, s.k, 6, 1.0f, s.k + 1);
    const Matrix bias = random_matrix(DType::kF32, 1, s.n, 7);
    for (const DType out_type : {act(), DType::kF32}) {
      Matrix expected(out_type, most, s.n, s.n);
      ref::linear(x.view(), packed.w, bias.view().row<float>(0), expected.view(), numeric_class());
      for (const int threads : {3, 2, 1}) {
        ThreadPool pool({.threads = threads, .spin_us = 5});
        Context ctx({.isa = isa(), .max_tokens = most, .max_k = s.k}, pool);
        for (const int64_t m : {int64_t{1}, int64_t{2}, int64_t{7}, int64_t{32}, most}) {
          if (isa() == Isa::kRef && m > 2) continue;
          Matrix out(out_type, m, s.n, s.n + 9);
          const Matrix before = out;
          linear(ctx, x.view().rows_of(most - m, m), packed.w, bias.view().row<float>(0),
                 out.view());
          for (int64_t t = 0; t < m; ++t)
            ASSERT_EQ(out.row_bits(t), expected.row_bits(most - m + t))
                << s.n << " x " << s.k << ", m " << m << ", token " << t << ", threads "
                << threads;
          // Nothing is written between the rows.
          for (int64_t t = 0; t < m; ++t)
            for (int64_t i = s.n; i < s.n + 9 && t + 1 < m; ++i)
              ASSERT_EQ(out.get(t, i), before.get(t, i));
        }
        if (kThreadSanitizer) break;
      }
      if (act() == DType::kF32 || kThreadSanitizer) break;
    }
  }
}

// A rank that owns only some panels computes their outputs as a rank that owns all.
TEST_P(Linear, AnyRangeOfPanelsGivesTheSameBits) {
  const int64_t n = 200;
  const int64_t k = 72;
  const Matrix w = random_matrix(dtype(), n, k, 8);
  const Matrix x = random_matrix(act(), 5, k, 9);
  Runner runner(isa(), 2);
  const Packed whole(w, isa());
  Matrix expected(DType::kF32, 5, n);
  linear(runner.ctx, x.view(), whole.w, nullptr, expected.view());
  for (const int64_t begin : {0, 16, 32, 48, 96, 144, 192}) {
    for (const int64_t end : {16, 64, 112, 144, 192, 200}) {
      if (begin >= end) continue;
      Matrix part(dtype(), end - begin, k);
      for (int64_t r = begin; r < end; ++r)
        for (int64_t c = 0; c < k; ++c) part.set(r - begin, c, w.get(r, c));
      const Packed packed(part, isa());
      Matrix out(DType::kF32, 5, n);
      linear(runner.ctx, x.view(), packed.w, nullptr, out.view().columns(begin, end - begin));
      for (int64_t t = 0; t < 5; ++t)
        for (int64_t i = begin; i < end; ++i) ASSERT_EQ(out.get(t, i), expected.get(t, i));
    }
  }
}

TEST_P(Linear, GatedGivesTheBitsOfItsClass) {
  for (const int64_t n : {8, 16, 88, 176}) {
    const int64_t k = 136;
    const Matrix gate = random_matrix(dtype(), n, k, 10);
    const Matrix up = random_matrix(dtype(), n, k, 11);
    const PackedPair packed(gate, up, isa());
    const Matrix x = random_matrix(act(), 100, k, 12);
    const Matrix biases = random_matrix(DType::kF32, 2, n, 13);
    Matrix expected(act(), 100, n);
    ref::gated_linear(x.view(), packed.w, biases.view().row<float>(0), biases.view().row<float>(1),
                      expected.view(), numeric_class());
    for (const int threads : {1, 2, 3}) {
      Runner runner(isa(), threads);
      for (const int64_t m : {1, 2, 7, 32, 100}) {
        if (isa() == Isa::kRef && m > 2) continue;
        Matrix out(act(), m, n, n + 3);
        gated_linear(runner.ctx, x.view().rows_of(0, m), packed.w, biases.view().row<float>(0),
                     biases.view().row<float>(1), out.view());
        for (int64_t t = 0; t < m; ++t)
          ASSERT_EQ(out.row_bits(t), expected.row_bits(t)) << n << ", m " << m << ", token " << t;
      }
    }
    // The same as two linear layers and silu.
    Runner runner(isa(), 1);
    Matrix g(DType::kF32, 3, n);
    Matrix u(DType::kF32, 3, n);
    const Packed gate_only(gate, isa());
    const Packed up_only(up, isa());
    linear(runner.ctx, x.view().rows_of(0, 3), gate_only.w, biases.view().row<float>(0), g.view());
    linear(runner.ctx, x.view().rows_of(0, 3), up_only.w, biases.view().row<float>(1), u.view());
    for (int64_t t = 0; t < 3; ++t) {
      for (int64_t i = 0; i < n; ++i) {
        Matrix one(act(), 1, 1);
        one.set(0, 0, ref::silu(g.get(t, i)) * u.get(t, i));
        ASSERT_EQ(one.get(0, 0), expected.get(t, i));
      }
    }
  }
}

TEST_P(Linear, BadNumbersStayInTheirRow) {
  const int64_t n = 40;
  const int64_t k = 73;
  const Matrix w = random_matrix(dtype(), n, k, 14);
  const Packed packed(w, isa());
  Matrix x = random_matrix(act(), 9, k, 15);
  Runner runner(isa(), 2);
  Matrix clean(act(), 9, n);
  linear(runner.ctx, x.view(), packed.w, nullptr, clean.view());
  x.set(4, 3, std::numeric_limits<float>::quiet_NaN());
  x.set(6, 72, std::numeric_limits<float>::infinity());
  Matrix out(act(), 9, n);
  linear(runner.ctx, x.view(), packed.w, nullptr, out.view());
  for (int64_t t = 0; t < 9; ++t) {
    if (t == 4 || t == 6) {
      for (int64_t i = 0; i < n; ++i)
        EXPECT_FALSE(std::isfinite(out.get(t, i)) && w.get(i, t == 4 ? 3 : 72) != 0) << i;
    } else {
      EXPECT_EQ(out.row_bits(t), clean.row_bits(t)) << t;
    }
  }
}

TEST(Silu, IsWithinTwoUlpsOfDoublePrecision) {
  for (float x = -90.0f; x < 90.0f; x += 0.0137f) {
    const double exact = x / (1.0 + std::exp(-static_cast<double>(x)));
    EXPECT_NEAR(ref::silu(x), exact, 3e-7 * std::fabs(exact) + 1e-36) << x;
    if (x < 88) {
      EXPECT_NEAR(ref::exp32(x), std::exp(static_cast<double>(x)),
                  2e-7 * std::exp(static_cast<double>(x)) + 2e-38)
          << x;
    }
  }
  EXPECT_EQ(ref::exp32(0.0f), 1.0f);
  EXPECT_EQ(ref::exp32(-200.0f), 0.0f);
  EXPECT_EQ(ref::exp32(200.0f), std::numeric_limits<float>::infinity());
  EXPECT_EQ(ref::silu(-1e30f), 0.0f);
  EXPECT_TRUE(std::isnan(ref::exp32(std::numeric_limits<float>::quiet_NaN())));
}

}  // namespace
}  // namespace phalanx::ops
