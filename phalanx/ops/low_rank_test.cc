#include "phalanx/ops/low_rank.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "phalanx/ops/packing.h"
#include "phalanx/ops/test_data.h"

namespace phalanx::ops {
namespace {

struct PackedF32 {
  explicit PackedF32(const Matrix& source, Isa isa)
      : memory(packed_bytes(source.view().rows, source.view().cols, DType::kF32, isa)) {
    pack_rows(source.view(), 0, source.view().rows, memory.data(), isa);
    w = {.data = memory.data(),
         .rows = source.view().rows,
         .k = source.view().cols,
         .dtype = DType::kF32,
         .isa = isa};
  }
  Aligned memory;
  PackedLinear w;
};

struct ScratchMemory {
  explicit ScratchMemory(int64_t k, int64_t ranks)
      : inputs(kLowRankRows * (k + 15) / 16 * 16 * 4 + 64 * kLowRankRows),
        reduced(kLowRankRows * ranks * 4),
        scratch{.inputs = reinterpret_cast<float*>(inputs.data()),
                .reduced = reinterpret_cast<float*>(reduced.data()),
                .max_k = (k + 15) / 16 * 16,
                .reduced_stride = ranks} {}
  Aligned inputs, reduced;
  LowRankScratch scratch;
};

class LowRank : public testing::TestWithParam<std::tuple<Isa, DType>> {
 protected:
  Isa isa() const { return std::get<0>(GetParam()); }
  DType act() const { return std::get<1>(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(AllPaths, LowRank,
                         testing::Combine(testing::ValuesIn(available_isas()),
                                          testing::Values(DType::kBF16, DType::kF32)),
                         [](const auto& info) {
                           return std::string(isa_name(std::get<0>(info.param))) + "_" +
                                  std::string(tensor::dtype_name(std::get<1>(info.param)));
                         });

// out + B (A x) by the definition, in double.
double expected(const Matrix& x, const Matrix& a, const Matrix& b, const Matrix& out, int64_t t,
                int64_t n) {
  double sum = out.get(t, n);
  for (int64_t r = 0; r < a.view().rows; ++r) {
    double inner = 0;
    for (int64_t k = 0; k < a.view().cols; ++k) inner += double{a.get(r, k)} * x.get(t, k);
    sum += double{b.get(n, r)} * inner;
  }
  return sum;
}

TEST_P(LowRank, AddsWhatTheDefinitionSaysToSomeRows) {
  for (const auto& [tokens, k, rank, outputs] :
       {std::tuple<int64_t, int64_t, int64_t, int64_t>{1, 7, 1, 5},
        {9, 54, 5, 77},
        {140, 130, 20, 200}}) {
    ThreadPool pool({.threads = 2, .spin_us = 0});
    Context ctx({.isa = isa(), .max_tokens = tokens, .max_k = k, .max_rows = outputs}, pool);
    const Matrix x = random_matrix(act(), tokens, k, 1);
    const Matrix a = random_matrix(DType::kF32, rank, k, 2, 0.3f);
    const Matrix b = random_matrix(DType::kF32, outputs, rank, 3, 0.3f);
    const Matrix a2 = random_matrix(DType::kF32, 2, k, 4, 0.3f);
    const Matrix b2 = random_matrix(DType::kF32, 3, 2, 5, 0.3f);
    const Matrix before = random_matrix(act(), tokens, outputs, 6, 1.0f, outputs + 3);
    Matrix out = before;
    const Matrix before2 = random_matrix(act(), tokens, 3, 7);
    Matrix out2 = before2;
    const PackedF32 pa(a, isa()), pb(b, isa()), pa2(a2, isa()), pb2(b2, isa());
    ScratchMemory memory(k, 64);
    std::vector<int32_t> rows;
    for (int32_t t = 0; t < tokens && std::ssize(rows) < kLowRankRows; ++t)
      if (t % 3 != 1) rows.push_back(t);
    const LowRankPart parts[] = {{.a = &pa.w, .b = &pb.w, .out = out.view()},
                                 {.a = &pa2.w, .b = &pb2.w, .out = out2.view()}};
    low_rank(ctx, x.view(), rows, 0, parts, memory.scratch);
    const double tolerance = act() == DType::kBF16 ? 0.02 : 1e-4;
    for (int64_t t = 0; t < tokens; ++t) {
      if (t % 3 == 1) {
        EXPECT_EQ(out.row_bits(t), before.row_bits(t)) << t;
        continue;
      }
      for (int64_t n = 0; n < outputs; ++n)
        ASSERT_NEAR(out.get(t, n), expected(x, a, b, before, t, n), tolerance) << t << " " << n;
      for (int64_t n = 0; n < 3; ++n)
        ASSERT_NEAR(out2.get(t, n), expected(x, a2, b2, before2, t, n), tolerance) << t << " " << n;
    }
    // Each row alone, with the outputs cut in two: the same bits.
    Matrix alone = before;
    const int64_t half = outputs / 2 / 16 * 16;
    for (const int32_t t : rows) {
      for (const auto& [begin, count] :
           {std::pair{int64_t{0}, half}, std::pair{half, outputs - half}}) {
        if (count == 0) continue;
        Matrix some(DType::kF32, count, rank);
        for (int64_t n = 0; n < count; ++n)
          for (int64_t r = 0; r < rank; ++r) some.set(n, r, b.get(begin + n, r));
        const PackedF32 cut(some, isa());
        const LowRankPart part{
            .a = &pa.w, .b = &cut.w, .out = alone.view().rows_of(t, 1).columns(begin, count)};
        const int32_t row = t;
        low_rank(ctx, x.view(), {&row, 1}, t, {&part, 1}, memory.scratch);
      }
      EXPECT_EQ(alone.row_bits(t), out.row_bits(t)) << t;
    }
  }
}

TEST_P(LowRank, GateAndUpInTwoStepsAreGatedLinear) {
  const DType weights = act() == DType::kBF16 ? DType::kBF16 : DType::kF32;
  const int64_t tokens = 21, k = 38, outputs = 45;
  ThreadPool pool({.threads = 2, .spin_us = 0});
  Context ctx({.isa = isa(), .max_tokens = tokens, .max_k = k, .max_rows = 128}, pool);
  const Matrix x = random_matrix(act(), tokens, k, 1);
  const Matrix gate = random_matrix(weights, outputs, k, 2);
  const Matrix up = random_matrix(weights, outputs, k, 3);
  Aligned memory(packed_gated_bytes(outputs, k, weights, isa()));
  pack_gated_rows(gate.view(), 0, outputs, 0, memory.data(), isa());
  pack_gated_rows(up.view(), 0, outputs, 1, memory.data(), isa());
  const PackedGated w{.panels = {.data = memory.data(),
                                 .rows = 2 * panels_of(outputs) * 16,
                                 .k = k,
                                 .dtype = weights,
                                 .isa = isa()},
                      .rows = outputs};
  std::vector<float> gate_bias(static_cast<size_t>(outputs), 0.25f),
      up_bias(gate_bias.size(), -0.5f);
  for (const bool biases : {false, true}) {
    const float* gb = biases ? gate_bias.data() : nullptr;
    const float* ub = biases ? up_bias.data() : nullptr;
    Matrix whole(act(), tokens, outputs), steps(act(), tokens, outputs);
    gated_linear(ctx, x.view(), w, gb, ub, whole.view());
    Aligned sum_memory(tokens * 2 * panels_of(outputs) * 16 * 4);
    const int64_t columns = 2 * panels_of(outputs) * 16;
    const MatrixView sums{sum_memory.data(), DType::kF32, tokens, columns, columns};
    gated_sums(ctx, x.view(), w, sums, {});
    gated_finish(ctx, sums, w, gb, ub, steps.view());
    EXPECT_EQ(whole.bits(), steps.bits());
  }
}

}  // namespace
}  // namespace phalanx::ops
