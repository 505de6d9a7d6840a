#include "phalanx/engine/block_pool.h"

#include <gtest/gtest.h>

#include <set>

namespace phalanx::engine {
namespace {

using Tokens = std::vector<int32_t>;

BlockPool sharing(int64_t blocks) {
  return BlockPool({.blocks = blocks, .block_size = 2, .share_prefixes = true});
}

// Fills a table with blocks for these tokens, as a sequence that has been computed would.
Tokens compute(BlockPool& pool, const Tokens& tokens, uint64_t salt = 0) {
  Tokens table;
  int64_t known = pool.reuse(salt, tokens, table);
  uint64_t place = known > 0 ? pool.place(table.back()) : PrefixIndex::root(salt);
  const std::span<const int32_t> all(tokens);
  EXPECT_TRUE(pool.allocate((std::ssize(tokens) + 1) / 2 - known, table));
  for (; (known + 1) * 2 <= std::ssize(tokens); ++known) {
    const auto i = static_cast<size_t>(known);
    place = pool.publish(place, all.subspan(2 * i, 2), table[i]);
  }
  return table;
}

int64_t known(BlockPool& pool, const Tokens& tokens, uint64_t salt = 0) {
  Tokens table;
  const int64_t count = pool.reuse(salt, tokens, table);
  pool.release(table);
  return count;
}

TEST(BlockPool, GivesAllOrNothing) {
  BlockPool pool({.blocks = 5});
  Tokens a, b;
  EXPECT_TRUE(pool.allocate(3, a));
  EXPECT_FALSE(pool.allocate(3, b));
  EXPECT_TRUE(b.empty());
  EXPECT_TRUE(pool.allocate(2, b));
  std::set<int32_t> all(a.begin(), a.end());
  all.insert(b.begin(), b.end());
  EXPECT_EQ(all, (std::set<int32_t>{0, 1, 2, 3, 4}));
  pool.release(a);
  EXPECT_TRUE(a.empty());
  EXPECT_EQ(pool.free(), 3);
  EXPECT_EQ(pool.total(), 5);
}

TEST(BlockPool, EqualBeginningsShareBlocks) {
  BlockPool pool = sharing(8);
  Tokens a = compute(pool, {1, 2, 3, 4, 5});
  EXPECT_EQ(pool.free(), 5);
  Tokens b = compute(pool, {1, 2, 3, 4, 9, 9, 9});
  EXPECT_EQ(b[0], a[0]);
  EXPECT_EQ(b[1], a[1]);
  EXPECT_NE(b[2], a[2]);
  EXPECT_EQ(pool.free(), 3);
  pool.release(a);
  EXPECT_EQ(pool.free(), 4);  // a's last block, the others are b's too
  pool.release(b);
  EXPECT_EQ(pool.free(), 8);
  EXPECT_EQ(known(pool, {1, 2, 3, 4, 9, 9}), 3);
  EXPECT_EQ(known(pool, {1, 2, 3, 5}), 1);
  EXPECT_EQ(known(pool, {3, 4}), 0) << "the same tokens elsewhere are not the same";
  EXPECT_EQ(known(pool, {1, 2}, 7), 0) << "another salt";
}

TEST(BlockPool, TheLeastRecentlyUsedGoesFirstAndTailsBeforeBeginnings) {
  BlockPool pool = sharing(6);
  Tokens a = compute(pool, {1, 2, 3, 4, 5, 6});
  pool.release(a);
  Tokens b = compute(pool, {7, 8, 9, 10});
  pool.release(b);
  EXPECT_EQ(pool.free(), 6);
  Tokens c;
  EXPECT_TRUE(pool.allocate(3, c));  // one without content, then a's last two
  EXPECT_EQ(known(pool, {1, 2, 3, 4, 5, 6}), 1);
  EXPECT_EQ(known(pool, {7, 8, 9, 10}), 2);
  // known() has used b last, so a's first goes now.
  Tokens d;
  EXPECT_TRUE(pool.allocate(1, d));
  EXPECT_EQ(known(pool, {1, 2}), 0);
  EXPECT_EQ(known(pool, {7, 8, 9, 10}), 2);
  pool.release(c);
  pool.release(d);
  EXPECT_EQ(pool.free(), 6);
}

TEST(BlockPool, TheSameContentTwiceIsKeptOnce) {
  BlockPool pool = sharing(6);
  Tokens a, b;
  ASSERT_TRUE(pool.allocate(2, a));
  ASSERT_TRUE(pool.allocate(2, b));  // computed at the same time, so neither could reuse
  const Tokens first{1, 2}, second{3, 4};
  const uint64_t place = pool.publish(PrefixIndex::root(0), first, a[0]);
  EXPECT_EQ(pool.publish(PrefixIndex::root(0), first, b[0]), place);
  (void)pool.publish(place, second, b[1]);
  pool.release(b);
  Tokens c;
  EXPECT_EQ(pool.reuse(0, Tokens{1, 2, 3, 4}, c), 2);
  EXPECT_EQ(c[0], a[0]);
  pool.release(a);
  pool.release(c);
  EXPECT_EQ(pool.free(), 6);
}

}  // namespace
}  // namespace phalanx::engine
