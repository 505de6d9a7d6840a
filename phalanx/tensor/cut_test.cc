#include "phalanx/tensor/cut.h"

#include <gtest/gtest.h>

#include <cmath>

#include "phalanx/tensor/dtype.h"

namespace phalanx::tensor {
namespace {

std::vector<Range> equal(int64_t total, int64_t unit, int n, bool high = false) {
  return cut(total, unit, std::vector<double>(static_cast<size_t>(n), 1.0), high);
}

TEST(Cut, CoversEverythingOnceForAnyCount) {
  for (int n = 1; n <= 9; ++n) {
    for (int64_t total : {0, 1, 15, 16, 17, 100, 576, 1536, 49152}) {
      for (bool high : {false, true}) {
        const auto ranges = equal(total, 16, n, high);
        int64_t at = 0;
        for (const Range& r : ranges) {
          EXPECT_EQ(r.begin, at);
          EXPECT_TRUE(r.begin % 16 == 0 || r.begin == total);
          at = r.end;
        }
        EXPECT_EQ(at, total);
        const int64_t least = total / 16 / n;
        for (const Range& r : ranges) EXPECT_LE(r.size(), (least + 1) * 16);
      }
    }
  }
}

TEST(Cut, NineHeadsOverFiveRanks) {
  const auto ranges = equal(9, 1, 5);
  EXPECT_EQ(ranges[0], (Range{0, 2}));
  EXPECT_EQ(ranges[4], (Range{8, 9}));
  EXPECT_EQ(kv_heads_of(ranges[1], 3), (Range{0, 2}));
}

TEST(Cut, FollowsWeights) {
  const std::vector<double> weights = {1, 3};
  EXPECT_EQ(cut(64, 16, weights)[0], (Range{0, 16}));
}

TEST(DType, HalfRoundTripsAllValues) {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const float f = f16_to_f32(static_cast<uint16_t>(h));
    if (std::isnan(f)) continue;
    EXPECT_EQ(f32_to_f16(f), h);
  }
  EXPECT_EQ(f32_to_f16(1e6f), 0x7c00);
  EXPECT_EQ(f32_to_bf16(1.00390625f), 0x3f80);  // half way: to even
}

}  // namespace
}  // namespace phalanx::tensor
