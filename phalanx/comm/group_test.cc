#include "phalanx/comm/group.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "phalanx/base/sanitizer.h"
#include "phalanx/comm/test_ranks.h"
#include "phalanx/net/testing_certificates.h"

namespace phalanx::comm {
namespace {

using Matrix = std::vector<std::byte>;

// What rank r has in `row` of its block in round `salt`: `bytes` bytes from the start.
const std::byte* pattern(int rank, int64_t row, uint32_t salt, int64_t bytes) {
  constexpr int64_t kStarts = 4096;
  static const Matrix noise = [] {
    std::mt19937_64 random(1);
    Matrix bytes(4 << 20);
    for (size_t i = 0; i < bytes.size(); i += 8) {
      const uint64_t word = random();
      std::memcpy(&bytes[i], &word, 8);
    }
    return bytes;
  }();
  EXPECT_LE(bytes + kStarts, static_cast<int64_t>(noise.size()));
  return noise.data() + (rank * 131 + row * 1789 + int64_t{salt} * 7919) % kStarts;
}

Matrix whole_matrix(int64_t rows, std::span<const int64_t> row_bytes, uint32_t salt) {
  Matrix matrix;
  for (int64_t row = 0; row < rows; ++row)
    for (size_t rank = 0; rank < row_bytes.size(); ++rank) {
      const std::byte* from = pattern(static_cast<int>(rank), row, salt, row_bytes[rank]);
      matrix.insert(matrix.end(), from, from + row_bytes[rank]);
    }
  return matrix;
}

// The whole with only the columns of `rank` filled.
Matrix only_own(Matrix matrix, int64_t rows, std::span<const int64_t> row_bytes, int rank) {
  size_t at = 0;
  for (int64_t row = 0; row < rows; ++row)
    for (size_t other = 0; other < row_bytes.size(); at += row_bytes[other++])
      if (static_cast<int>(other) != rank)
        std::fill_n(matrix.begin() + at, row_bytes[other], std::byte{0xee});
  return matrix;
}

void check_all_gather(Group& group, int64_t rows, std::span<const int64_t> row_bytes,
                      uint32_t salt) {
  const Matrix expected = whole_matrix(rows, row_bytes, salt);
  Matrix matrix = only_own(expected, rows, row_bytes, group.rank());
  group.all_gather(matrix.data(), rows, row_bytes);
  EXPECT_TRUE(matrix == expected) << "all_gather on rank " << group.rank() << " of " << rows
                                  << " rows of " << ::testing::PrintToString(std::vector<int64_t>(row_bytes.begin(), row_bytes.end()));
}

void check_gather(Group& group, int64_t rows, std::span<const int64_t> row_bytes, int root,
                  uint32_t salt) {
  const Matrix expected = whole_matrix(rows, row_bytes, salt);
  Matrix matrix;
  if (group.rank() == root) {
    matrix = only_own(expected, rows, row_bytes, root);
  } else {
    const int64_t bytes = row_bytes[group.rank()];
    for (int64_t row = 0; row < rows; ++row) {
      const std::byte* from = pattern(group.rank(), row, salt, bytes);
      matrix.insert(matrix.end(), from, from + bytes);
    }
  }
  group.gather(matrix.data(), rows, row_bytes, root);
  if (group.rank() == root) {
    EXPECT_TRUE(matrix == expected) << "gather of " << rows << " rows to rank " << root;
  }
}

void check_broadcast(Group& group, int64_t bytes, int root, uint32_t salt) {
  const std::byte* from = pattern(root, 3, salt, bytes);
  const Matrix expected(from, from + bytes);
  Matrix data = group.rank() == root ? expected : Matrix(bytes, std::byte{0xee});
  group.broadcast(data, root);
  EXPECT_TRUE(data == expected) << "broadcast of " << bytes << " bytes from rank " << root
                                << " on rank " << group.rank();
}

// Values whose sum depends on the order of additions.
float awkward(int rank, int64_t i) {
  const float scale[] = {1.0f, 1e8f, -1e8f, 3.14159f, 1e-4f};
  return scale[(i + rank * 3) % 5] * (1.0f + static_cast<float>((i * 7 + rank) % 13) * 0.1f);
}

void check_all_reduce(Group& group, int64_t count) {
  // The pattern repeats, so that the expected sums are cheap.
  constexpr int64_t kPeriod = 65;
  float own[kPeriod], sums[kPeriod];
  for (int64_t i = 0; i < kPeriod; ++i) {
    own[i] = awkward(group.rank(), i);
    sums[i] = awkward(0, i);
    for (int rank = 1; rank < group.size(); ++rank) sums[i] += awkward(rank, i);
  }
  std::vector<float> values(count), expected(count);
  for (int64_t i = 0; i < count; i += kPeriod) {
    std::memcpy(&values[i], own, std::min(kPeriod, count - i) * sizeof(float));
    std::memcpy(&expected[i], sums, std::min(kPeriod, count - i) * sizeof(float));
  }
  group.all_reduce(values);
  EXPECT_TRUE(count == 0 ||
              std::memcmp(values.data(), expected.data(), count * sizeof(float)) == 0)
      << "all_reduce of " << count << " on rank " << group.rank();
}

std::vector<int64_t> uneven(int size, int64_t unit, int variant) {
  std::vector<int64_t> bytes(size);
  for (int rank = 0; rank < size; ++rank) bytes[rank] = unit * ((rank * 5 + variant) % 4);
  return bytes;
}

struct Layout {
  const char* name;
  std::vector<int> node_of;
  bool tls = false;
  bool ucx = false;
};

// One certificate of all addresses that test ranks have; made once, keys are dear under sanitisers.
std::shared_ptr<const net::TlsMaterial> certificate_for_all() {
  static net::TestCertificates certificates;
  static const auto material = [] {
    auto order = net::TestCertificates::order("127.0.0.1", "");
    for (int node = 2; node <= 8; ++node)
      order.addresses.push_back(fmt::format("127.0.0.{}", node));
    return certificates.material(order);
  }();
  return material;
}
void PrintTo(const Layout& layout, std::ostream* out) { *out << layout.name; }

class GroupTest : public ::testing::TestWithParam<Layout> {
 protected:
  void SetUp() override {
    if (GetParam().ucx)
      if (const std::string why = ucx_problem(); !why.empty()) GTEST_SKIP() << why;
  }
  void everywhere(const std::function<void(Group&)>& body) {
    TestRanks ranks(GetParam().node_of);
    if (GetParam().tls) ranks.encrypt(certificate_for_all());
    if (GetParam().ucx) ranks.shared_options().transport = Transport::kUcx;
    const auto outcomes = ranks.run(body);
    for (const auto& outcome : outcomes)
      if (outcome.error) ADD_FAILURE() << outcome.error->what();
  }
};

TEST_P(GroupTest, AllGatherFillsEveryColumn) {
  everywhere([](Group& group) {
    uint32_t salt = 0;
    for (const int64_t rows : {1, 2, 7, 64})
      for (const int64_t unit : {0, 1, 3, 64, 1000})
        for (int variant = 0; variant < 4; ++variant)
          check_all_gather(group, rows, uneven(group.size(), unit, variant), ++salt);
    check_all_gather(group, 0, uneven(group.size(), 16, 1), ++salt);
  });
}

TEST_P(GroupTest, AllGatherOfLargeMatrices) {
  everywhere([](Group& group) {
    const std::vector<int64_t> even(group.size(), 300'001);
    check_all_gather(group, 1, even, 1);
    check_all_gather(group, 1, uneven(group.size(), 700'003, 2), 2);
    check_all_gather(group, 600, uneven(group.size(), 1025, 1), 3);
    std::vector<int64_t> one(group.size(), 0);
    one[group.size() / 2] = 1'234'567;
    check_all_gather(group, 1, one, 4);
    check_all_gather(group, 3, one, 5);
  });
}

TEST_P(GroupTest, GatherReachesEveryRoot) {
  everywhere([](Group& group) {
    uint32_t salt = 0;
    for (int root = 0; root < group.size(); ++root)
      for (const int64_t rows : {1, 5})
        for (const int64_t unit : {0, 4, 999, 150'001})
          check_gather(group, rows, uneven(group.size(), unit, root), root, ++salt);
  });
}

TEST_P(GroupTest, BroadcastFromEveryRoot) {
  everywhere([](Group& group) {
    uint32_t salt = 0;
    for (int root = 0; root < group.size(); ++root)
      for (const int64_t bytes : {0, 1, 100, 65'537, 1'500'001})
        check_broadcast(group, bytes, root, ++salt);
  });
}

TEST_P(GroupTest, AllReduceAddsInRankOrder) {
  everywhere([](Group& group) {
    for (const int64_t count : {0, 1, 5, 64, 1000, 16'385, 100'003, 500'009})
      check_all_reduce(group, count);
  });
}

TEST_P(GroupTest, BarrierHoldsUntilAllAreThere) {
  std::atomic<int> arrived{0};
  const int size = static_cast<int>(GetParam().node_of.size());
  everywhere([&](Group& group) {
    for (int round = 1; round <= 20; ++round) {
      arrived.fetch_add(1);
      group.barrier();
      EXPECT_GE(arrived.load(), round * size);
      group.barrier();
    }
  });
}

TEST_P(GroupTest, RandomSequencesOfOperations) {
  everywhere([](Group& group) {
    const uint64_t before = group.stats().operations;
    std::mt19937 random(20251122);  // the same on all ranks
    const auto below = [&](int limit) { return static_cast<int>(random() % limit); };
    for (int i = 0; i < 150; ++i) {
      const int root = below(group.size());
      const int64_t unit = below(3) == 0 ? below(40'000) : below(200);
      const int64_t rows = 1 + below(4);
      switch (below(5)) {
        case 0: check_all_gather(group, rows, uneven(group.size(), unit, i), i); break;
        case 1: check_gather(group, rows, uneven(group.size(), unit, i), root, i); break;
        case 2: check_broadcast(group, unit * 3, root, i); break;
        case 3: check_all_reduce(group, unit); break;
        default: group.barrier();
      }
    }
    EXPECT_EQ(group.stats().operations - before, 150u);
  });
}

std::vector<Layout> layouts() {
  std::vector<Layout> all = {{"One", {0}},
                             {"TwoOnOneNode", {0, 0}},
                             {"TwoNodes", {0, 1}},
                             {"ThreeOnOneNode", {0, 0, 0}},
                             {"ThreeNodes", {0, 1, 2}},
                             {"TwoAndOne", {0, 0, 1}},
                             {"TwoNodesTls", {0, 1}, true},
                             {"TwoNodesUcx", {0, 1}, false, true},
                             {"TwoAndOneUcx", {0, 0, 1}, false, true},
                             {"ThreeNodesUcxTls", {0, 1, 2}, true, true},
                             {"TwoAndOneTls", {0, 0, 1}, true},
                             {"OneAndThree", {0, 1, 1, 1}},
                             {"TwoByTwo", {0, 0, 1, 1}},
                             {"Interleaved", {0, 1, 0, 1}},
                             {"FiveUneven", {1, 0, 0, 2, 0}}};
  if (kThreadSanitizer) return all;
  all.insert(all.end(), {{"FiveNodes", {0, 1, 2, 3, 4}},
                         {"FourNodesTls", {0, 1, 2, 3}, true},
                         {"SixUneven", {0, 0, 0, 1, 1, 2}},
                         {"SevenUneven", {0, 1, 1, 2, 2, 2, 0}},
                         {"EightOnOneNode", {0, 0, 0, 0, 0, 0, 0, 0}},
                         {"EightOnFour", {0, 0, 1, 1, 2, 2, 3, 3}},
                         {"EightUneven", {0, 0, 0, 0, 0, 1, 1, 2}}});
  return all;
}

INSTANTIATE_TEST_SUITE_P(Layouts, GroupTest, ::testing::ValuesIn(layouts()),
                         [](const auto& info) { return info.param.name; });

TEST(GroupStatsTest, CountWhatCrossedNodesAndWhatDidNot) {
  TestRanks ranks({0, 0, 1});
  const auto outcomes = ranks.run([](Group& group) {
    const GroupStats before = group.stats();
    std::vector<std::byte> matrix(3000);
    const std::vector<int64_t> even(3, 1000);
    group.all_gather(matrix.data(), 1, even);
    const GroupStats after = group.stats();
    const uint64_t sent = after.bytes_sent - before.bytes_sent;
    const uint64_t received = after.bytes_received - before.bytes_received;
    // Rank 2's block crosses once, to rank 0, who shares it with rank 1.
    EXPECT_EQ(sent, 1000u);
    EXPECT_EQ(received, group.rank() == 2 ? 2000u : group.rank() == 0 ? 1000u : 0u);
    EXPECT_EQ(after.bytes_shared > before.bytes_shared, group.rank() != 2);
    EXPECT_EQ(after.operations, before.operations + 1);
  });
  for (const auto& outcome : outcomes)
    if (outcome.error) ADD_FAILURE() << outcome.error->what();
}

}  // namespace
}  // namespace phalanx::comm
