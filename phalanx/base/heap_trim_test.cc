#include "phalanx/base/heap_trim.h"

#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "phalanx/base/sanitizer.h"

namespace phalanx {
namespace {

constexpr int64_t kMiB = 1 << 20;

TEST(HeapTrim, GivesBackWhatLiesBetweenBlocksInUse) {
  if (kAddressSanitizer || kThreadSanitizer) GTEST_SKIP() << "sanitisers bring their own allocator";
  HeapTrim trim;
  trim.when_idle();
  // Each small block that stays keeps the top of the heap from falling.
  std::vector<std::unique_ptr<std::vector<char>>> rush;
  std::vector<std::unique_ptr<std::vector<char>>> kept;
  for (int i = 0; i < 2048; ++i) {
    rush.push_back(std::make_unique<std::vector<char>>(32 << 10, 'x'));
    kept.push_back(std::make_unique<std::vector<char>>(64, 'y'));
  }
  const int64_t peak = own_resident_bytes();
  rush.clear();
  trim.when_idle();
  EXPECT_LT(own_resident_bytes(), peak - 48 * kMiB);
  EXPECT_EQ(kept.front()->front(), 'y');
}

}  // namespace
}  // namespace phalanx
