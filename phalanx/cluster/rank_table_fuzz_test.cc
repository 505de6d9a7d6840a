// Damaged rank tables, both forms, and control messages: read or refused. PHALANX_FUZZ_SECONDS;
// `make fuzz`.

#include <gtest/gtest.h>

#include <iostream>

#include "control.pb.h"
#include "phalanx/base/error.h"
#include "phalanx/base/fuzz.h"
#include "phalanx/cluster/rank_table.h"

namespace phalanx::cluster {
namespace {

constexpr const char* kFormA = R"({"server_count":"2","server_list":[
 {"device":[{"device_id":"0","device_ip":"10.20.0.2","rank_id":"0"},
            {"device_id":"1","device_ip":"10.20.0.3","rank_id":"1"}],"server_id":"10.20.0.1"},
 {"device":[{"device_id":"0","device_ip":"10.20.0.5","rank_id":"2","weight":2.5}],
  "server_id":"10.20.0.4","container_ip":"172.16.0.2"}],"status":"completed","version":"1.0"})";

TEST(RankTableFuzz, ReadOrRefused) {
  const RankTable good = parse_rank_table(kFormA, "seed");
  int64_t read = 0;
  const int64_t tried = fuzz({kFormA, to_json(good)}, [&](const std::string& text, int64_t number) {
    SCOPED_TRACE(number);
    try {
      const RankTable table = parse_rank_table(text, "ranktable.json");
      ++read;
      ASSERT_GE(table.master(), 0);
      ASSERT_LT(table.master(), static_cast<int>(table.servers.size()));
      for (int rank = 0; rank < table.world_size; ++rank)
        ASSERT_EQ(table.device_of_rank(rank).rank_id, rank);
      (void)table.digest();
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()), "");
    }
  });
  std::cout << tried << " tables, " << read << " read\n";
  EXPECT_GT(tried, 100);
}

TEST(ControlMessageFuzz, ReadOrRefused) {
  control::v1::FromNode join;
  join.mutable_join()->set_server(1);
  std::string seed;
  ASSERT_TRUE(join.SerializeToString(&seed));
  int64_t read = 0;
  const int64_t tried = fuzz({seed, seed + seed}, [&](const std::string& text, int64_t) {
    control::v1::FromNode node;
    control::v1::FromMaster master;
    read += node.ParseFromString(text) ? 1 : 0;
    read += master.ParseFromString(text) ? 1 : 0;
  });
  std::cout << tried << " messages, " << read << " read\n";
  EXPECT_GT(tried, 100);
}

}  // namespace
}  // namespace phalanx::cluster
