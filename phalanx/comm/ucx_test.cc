#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "phalanx/comm/fault.h"
#include "phalanx/comm/test_ranks.h"
#include "phalanx/comm/ucx/ucx.h"
#include "phalanx/net/address.h"

namespace phalanx::comm {
namespace {

namespace fs = std::filesystem;

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

class UcxTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string why = ucx_problem(); !why.empty()) GTEST_SKIP() << why;
  }
};

// Sets a variable until its end.
class Variable {
 public:
  Variable(const char* name, const char* value) : name_(name) { ::setenv(name, value, 1); }
  ~Variable() { ::unsetenv(name_); }

 private:
  const char* name_;
};

TEST(UcxDevicesTest, AreTheInterfaceOfTheAddressAndTheRdmaPortsOfItsCard) {
  const fs::path sysfs = fs::temp_directory_path() / fmt::format("phalanx-sysfs-{}", ::getpid());
  fs::create_directories(sysfs / "class/net/lo/device/infiniband/mlx5_3/ports/2");
  EXPECT_EQ(ucx_devices("127.0.0.1", sysfs), "lo,mlx5_3:2");
  EXPECT_EQ(ucx_devices("127.9.8.7", sysfs), "lo,mlx5_3:2");
  EXPECT_EQ(ucx_devices("127.0.0.1", sysfs / "nothing"), "lo");
  EXPECT_EQ(ucx_devices("192.0.2.77", sysfs), "");  // an address of no interface
  EXPECT_EQ(ucx_devices("", sysfs), "");
  fs::remove_all(sysfs);
}

TEST_F(UcxTest, TheUsersVariablesCount) {
  {
    const Variable taken("UCX_RNDV_THRESH", "77777");
    prepare_environment_for_ucx();
    EXPECT_STREQ(std::getenv("UCX_RNDV_THRESH"), "77777");
    EXPECT_STREQ(std::getenv("UCX_HANDLE_ERRORS"), "none");
    EXPECT_STREQ(std::getenv("UCX_TCP_RX_SEG_SIZE"), "256k");
  }
  prepare_environment_for_ucx();
  EXPECT_STREQ(std::getenv("UCX_RNDV_THRESH"), "inf");
}

TEST_F(UcxTest, TransportsThatDoNotExistAreNamedAndEndForming) {
  const Variable none("UCX_TLS", "no_such_transport");
  const Variable quiet("UCX_LOG_LEVEL", "fatal");
  TestRanks ranks({0, 1});
  ranks.shared_options().transport = Transport::kUcx;
  ranks.shared_options().connect_seconds = 5;
  const auto outcomes = ranks.run([](Group& group) { group.barrier(); });
  for (const auto& outcome : outcomes) {
    ASSERT_TRUE(outcome.error);
    EXPECT_TRUE(contains(outcome.error->what(), "UCX_TLS=no_such_transport"))
        << outcome.error->what();
    EXPECT_TRUE(contains(outcome.error->what(), "Fix: ")) << outcome.error->what();
    EXPECT_LT(outcome.seconds, 4);
  }
}

// One side speaks plain TCP: both are told, and neither waits for long.
TEST_F(UcxTest, ARankWithoutItIsNamed) {
  TestRanks ranks({0, 1});
  ranks.shared_options().connect_seconds = 5;
  const auto outcomes = ranks.run_with([&](int rank) {
    GroupOptions options = ranks.options(rank);
    options.transport = rank == 0 ? Transport::kUcx : Transport::kTcp;
    (void)form_group(options, ranks.listener(rank), ranks.memory(rank));
  });
  ASSERT_TRUE(outcomes[0].error && outcomes[1].error);
  EXPECT_TRUE(contains(outcomes[0].error->what(), "rank 1 (host-b) sent no UCX address"))
      << outcomes[0].error->what();
  EXPECT_TRUE(contains(outcomes[0].error->what(), "the same PHALANX_DATA_PLANE on all nodes"));
  EXPECT_LT(outcomes[1].seconds, 4);
}

// A peer that does not read holds up nobody for longer than the cap, and loses nothing.
TEST_F(UcxTest, ASlowReaderGetsAllOfALargeMessage) {
  TestRanks ranks({0, 1});
  ranks.shared_options().transport = Transport::kUcx;
  const auto outcomes = ranks.run([](Group& group) {
    std::vector<std::byte> bytes(24 << 20);
    for (size_t i = 0; i < bytes.size(); ++i)
      bytes[i] = group.rank() == 0 ? static_cast<std::byte>(i * 7 + i / 4093) : std::byte{0};
    if (group.rank() == 1) std::this_thread::sleep_for(std::chrono::milliseconds(200));
    group.broadcast(bytes, 0);
    for (size_t i = 0; i < bytes.size(); ++i)
      ASSERT_EQ(bytes[i], static_cast<std::byte>(i * 7 + i / 4093)) << i;
  });
  for (const auto& outcome : outcomes)
    if (outcome.error) ADD_FAILURE() << outcome.error->what();
}

// Who has all it wants may leave at once; what it sent before still arrives.
TEST_F(UcxTest, LeavingInOrderLosesNothing) {
  for (int round = 0; round < 10; ++round) {
    TestRanks ranks({0, 1, 2});
    ranks.shared_options().transport = Transport::kUcx;
    const auto outcomes = ranks.run([&](Group& group) {
      std::vector<std::byte> matrix(3 * 200'000, static_cast<std::byte>(group.rank()));
      const std::vector<int64_t> row_bytes(3, 200'000);
      if (group.rank() == 2) std::this_thread::sleep_for(std::chrono::milliseconds(5));
      group.all_gather(matrix.data(), 1, row_bytes);
      for (int rank = 0; rank < 3; ++rank)
        EXPECT_EQ(matrix[rank * 200'000 + 199'999], static_cast<std::byte>(rank));
    });
    for (const auto& outcome : outcomes)
      if (outcome.error) ADD_FAILURE() << outcome.error->what();
  }
}

}  // namespace
}  // namespace phalanx::comm
