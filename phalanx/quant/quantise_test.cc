#include "phalanx/quant/quantise.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "phalanx/quant/format.h"

namespace phalanx::quant {
namespace {

template <typename T>
PartBytes part(PartSpec::Role role, DType dtype, const std::vector<T>& v) {
  return {role, dtype, std::as_bytes(std::span(v))};
}

// What quantise_rows writes is what assemble reads, and no weight moves by more than half a step.
TEST(Quantise, IsReadBackWithinHalfAStep) {
  constexpr int64_t kRows = 5;
  constexpr int64_t kK = 96;
  std::mt19937 random(1);
  std::vector<float> weights(kRows * kK);
  for (float& w : weights) w = static_cast<float>(random() % 2001) / 1000.0F - 1.0F;
  std::fill(weights.begin() + 2 * kK, weights.begin() + 3 * kK, 0.0F);  // a row of zeros
  for (const int bits : {4, 8}) {
    for (const int64_t group : {int64_t{0}, int64_t{32}}) {
      const QuantisedRows q = quantise_rows(weights, kRows, kK, bits, group, DType::kF32);
      const std::vector<uint32_t> words = pack_words(q.codes, kRows, kK, bits);
      const LinearFormat format{.scheme = Scheme::kCtPacked,
                                .storage = bits == 4 ? Storage::kCodes4 : Storage::kCodes8,
                                .bits = bits, .group = group};
      const PartBytes parts[] = {part(PartSpec::Role::kCodes, DType::kI32, words),
                                 part(PartSpec::Role::kScale, DType::kF32, q.scale)};
      Problems problems;
      const Rows rows = assemble(format, kK, {0, kRows}, parts, {}, "test", problems);
      EXPECT_TRUE(problems.empty()) << problems.to_string();
      std::vector<float> back(weights.size());
      dequantize(rows, {}, back.data());
      const int64_t size = group == 0 ? kK : group;
      for (size_t i = 0; i < weights.size(); ++i)
        ASSERT_LE(std::fabs(back[i] - weights[i]),
                  0.5001F * q.scale[i / static_cast<size_t>(size)])
            << bits << " bits, group " << group << ", element " << i;
    }
  }
}

TEST(Quantise, ScalesAreWhatTheirTypeHolds) {
  const std::vector<float> weights = {0.3F, -0.7F, 0.111F, 0.0F};
  const QuantisedRows q = quantise_rows(weights, 1, 4, 8, 0, DType::kBF16);
  EXPECT_EQ(q.scale[0], tensor::bf16_to_f32(tensor::f32_to_bf16(0.7F / 127.0F)));
  EXPECT_EQ(q.codes[1], static_cast<int8_t>(std::nearbyint(-0.7F / q.scale[0])));
}

TEST(Order, OfDamagedGroupsIsRefused) {
  const LinearFormat format{.scheme = Scheme::kGptq, .storage = Storage::kCodes4, .bits = 4,
                            .group = 2};
  for (const auto& [g_idx, says] :
       {std::pair(std::vector<int32_t>{0, 0, 1, 7}, "group index out of range"),
        std::pair(std::vector<int32_t>{0, 0, 0, 1}, "group of another size")}) {
    Problems problems;
    EXPECT_TRUE(read_order(format, 4, std::as_bytes(std::span(g_idx)), "file: g_idx", problems).empty());
    EXPECT_NE(problems.to_string().find(says), std::string::npos) << problems.to_string();
  }
  Problems problems;
  const std::vector<int32_t> mixed = {1, 0, 1, 0};
  EXPECT_EQ(read_order(format, 4, std::as_bytes(std::span(mixed)), "file", problems),
            (std::vector<int32_t>{1, 3, 0, 2}));
}

}  // namespace
}  // namespace phalanx::quant
