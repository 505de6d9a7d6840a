#include <gtest/gtest.h>

#include "phalanx/ops/moe.h"
#include "phalanx/ops/packing.h"
#include "phalanx/ops/quantised.h"
#include "phalanx/ops/test_data.h"

namespace phalanx::ops {
namespace {

using quant::Storage;

// Random experts of one layer, of any formats.
struct Experts {
  Experts(Isa isa, int64_t n, int64_t k) : isa(isa), n(n), k(k) {}

  PackedLinear pack(const PackedLinear& shape, int64_t rows, int64_t step, int64_t offset,
                    uint32_t seed, Aligned& memory) const {
    PackedLinear w = shape;
    w.data = memory.data();
    if (w.storage == Storage::kFloat) {
      const Matrix source = random_matrix(w.dtype, rows, k, seed);
      if (step == 1)
        pack_rows(source.view(), 0, rows, memory.data(), isa);
      else
        pack_gated_rows(source.view(), 0, rows, static_cast<int>(offset), memory.data(), isa);
      return w;
    }
    std::mt19937 random(seed);
    const int64_t groups = (k + w.group - 1) / w.group;
    std::vector<uint8_t> codes(static_cast<size_t>(rows * k));
    for (uint8_t& c : codes)
      c = static_cast<uint8_t>(w.storage == Storage::kCodes4     ? random() % 16
                               : w.storage == Storage::kCodesFp8 ? random() % 120
                                                                 : random() % 256);
    std::vector<float> scale(static_cast<size_t>(rows * groups));
    for (float& s : scale) s = 0.001F * static_cast<float>(1 + random() % 9);
    const bool int8 = w.storage == Storage::kInt8;
    std::vector<float> zero(w.zeros || int8 ? scale.size() : 0, 2.5F);
    const quant::Rows source{.storage = w.storage,
                             .rows = rows,
                             .k = k,
                             .group = w.group,
                             .codes = codes,
                             .scale = scale,
                             .zero = zero,
                             .add = std::vector<int32_t>(int8 ? static_cast<size_t>(rows) : 0, 7)};
    pack_quantised(source, 0, rows, w, step, offset, memory.data());
    return w;
  }

  void add(Storage storage, DType dtype, int64_t group, bool zeros, uint32_t seed) {
    const PackedLinear shape{.rows = n, .k = k, .dtype = dtype, .isa = isa, .storage = storage,
                             .group = group, .zeros = zeros};
    const bool is_float = storage == Storage::kFloat;
    memory.emplace_back(is_float ? packed_bytes(n, k, dtype, isa) : packed_bytes(shape));
    linear.push_back(pack(shape, n, 1, 0, seed, memory.back()));
    PackedLinear panels = shape;
    panels.rows = 2 * panels_of(n) * tensor::kPanelRows;
    memory.emplace_back(is_float ? packed_gated_bytes(n, k, dtype, isa) : packed_bytes(panels));
    panels = pack(panels, n, 2, 0, seed + 1, memory.back());
    panels = pack(panels, n, 2, 1, seed + 2, memory.back());
    gated.push_back({.panels = panels, .rows = n});
  }

  Isa isa;
  int64_t n;
  int64_t k;
  std::vector<Aligned> memory;
  std::vector<PackedLinear> linear;
  std::vector<PackedGated> gated;
};

class OfExperts : public ::testing::TestWithParam<Isa> {};

// rows: of each expert, in the order of `experts`.
void expect_the_bits_of_single_layers(const Experts& experts, const std::vector<int64_t>& rows,
                                      DType act, int threads) {
  ThreadPool pool({.threads = threads, .spin_us = 5});
  Context ctx({.isa = experts.isa, .max_tokens = 600, .max_k = 256, .max_rows = 512,
               .max_heads = 1, .max_head_dim = 16, .max_context = 16, .quantised = true},
              pool);
  std::vector<ExpertLinear> linear_parts;
  std::vector<ExpertGated> gated_parts;
  int64_t end = 0;
  for (size_t e = 0; e < rows.size(); ++e) {
    const size_t which = e % experts.linear.size();
    linear_parts.push_back({&experts.linear[which], {end, end + rows[e]}});
    gated_parts.push_back({&experts.gated[which], {end, end + rows[e]}});
    end += rows[e];
  }
  const Matrix x = random_matrix(act, end, experts.k, 7, 1.0F, experts.k + 3);
  Matrix expected(DType::kF32, end, experts.n, experts.n + 5);
  Matrix found(DType::kF32, end, experts.n, experts.n + 5);
  Matrix expected_gated(act, end, experts.n);
  Matrix found_gated(act, end, experts.n);
  for (size_t e = 0; e < rows.size(); ++e) {
    const tensor::Range own = linear_parts[e].rows;
    if (own.size() == 0) continue;
    linear(ctx, x.view().rows_of(own.begin, own.size()), *linear_parts[e].w, nullptr,
           expected.view().rows_of(own.begin, own.size()));
    gated_linear(ctx, x.view().rows_of(own.begin, own.size()), *gated_parts[e].w, nullptr, nullptr,
                 expected_gated.view().rows_of(own.begin, own.size()));
  }
  linear_of_experts(ctx, x.view(), linear_parts, found.view());
  gated_linear_of_experts(ctx, x.view(), gated_parts, found_gated.view());
  for (int64_t r = 0; r < end; ++r) {
    ASSERT_EQ(found.row_bits(r), expected.row_bits(r)) << "row " << r << ", threads " << threads;
    ASSERT_EQ(found_gated.row_bits(r), expected_gated.row_bits(r)) << "row " << r;
  }
}

TEST_P(OfExperts, GiveTheBitsOfSingleLayers) {
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    const DType act = dtype == DType::kBF16 ? DType::kBF16 : DType::kF32;
    Experts floats(GetParam(), 70, 53);
    Experts mixed(GetParam(), 40, 96);
    for (uint32_t e = 0; e < 3; ++e) floats.add(Storage::kFloat, dtype, 0, false, 10 * e);
    mixed.add(Storage::kInt8, dtype, 96, false, 1);
    mixed.add(Storage::kFloat, dtype, 0, false, 2);
    mixed.add(Storage::kCodes4, dtype, 32, true, 3);
    mixed.add(Storage::kCodes8, dtype, 96, true, 4);
    mixed.add(Storage::kCodesFp8, dtype, 16, false, 5);
    mixed.add(Storage::kInt8, dtype, 96, false, 6);
    for (const int threads : {1, 3}) {
      if (GetParam() == Isa::kRef && threads > 1) break;
      // None, few and many rows; more than a block; more experts than go into one wave.
      expect_the_bits_of_single_layers(floats, {1, 0, 2, 7, 0, 13, 100, 1}, act, threads);
      expect_the_bits_of_single_layers(floats, {0, 420, 3}, act, threads);
      expect_the_bits_of_single_layers(floats, {500, 200, 50}, act, threads);
      expect_the_bits_of_single_layers(floats, std::vector<int64_t>(140, 1), act, threads);
      expect_the_bits_of_single_layers(mixed, {1, 2, 0, 3, 1, 1, 4, 1, 9, 30, 8, 0, 20}, act,
                                       threads);
      expect_the_bits_of_single_layers(mixed, {200, 5, 190, 390, 90}, act, threads);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, OfExperts, ::testing::ValuesIn(available_isas()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

}  // namespace
}  // namespace phalanx::ops
