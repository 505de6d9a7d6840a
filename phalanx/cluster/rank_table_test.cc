#include "phalanx/cluster/rank_table.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>

namespace phalanx::cluster {
namespace {

const std::string kFormA = R"({"server_count":"2",
 "server_list":[
  {"device":[{"device_id":"0","device_ip":"10.10.100.10","rank_id":"0"},
             {"device_id":"1","device_ip":"10.10.100.11","rank_id":"1"}],
   "server_id":"90.90.152.89"},
  {"device":[{"device_id":"0","device_ip":"10.10.100.22","rank_id":"2"},
             {"device_id":"1","device_ip":"10.10.100.23","rank_id":"3"}],
   "server_id":"90.90.152.91"}],
 "status":"completed","version":"1.0"})";

const std::string kFormB = R"({"version":"1.0","server_count":"2",
 "server_list":[
  {"server_id":"10.0.0.1","container_ip":"10.0.0.1",
   "device":[{"device_id":"0","device_ip":"10.20.0.2","rank_id":"0"}]},
  {"server_id":"10.0.0.2","container_ip":"10.0.0.2",
   "device":[{"device_id":"0","device_ip":"10.20.0.3","rank_id":"1"}]}],
 "status":"completed"})";

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

std::string message_of(const std::string& text) {
  try {
    (void)parse_rank_table(text, "t.json");
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::kInvalidArgument);
    return e.what();
  }
  return "accepted";
}

bool has_note(const RankTable& table, const std::string& part) {
  for (const std::string& note : table.notes) {
    if (note.find(part) != std::string::npos) return true;
  }
  return false;
}

TEST(RankTable, ReadsFormB) {
  const RankTable table = parse_rank_table(kFormB, "t.json");
  ASSERT_EQ(table.servers.size(), 2u);
  EXPECT_EQ(table.world_size, 2);
  EXPECT_EQ(table.master(), 0);
  EXPECT_EQ(table.server_of_rank(1), 1);
  EXPECT_EQ(table.device_of_rank(1).device_ip, "10.20.0.3");
  EXPECT_TRUE(table.notes.empty()) << table.notes[0];
}

TEST(RankTable, ReadsFormAWithANote) {
  const RankTable table = parse_rank_table(kFormA, "t.json");
  EXPECT_EQ(table.world_size, 4);
  EXPECT_EQ(table.servers[1].container_ip, "90.90.152.91");
  EXPECT_TRUE(has_note(table, "server_list[1].container_ip: not given, server_id 90.90.152.91"));
}

TEST(RankTable, MasterIsTheServerOfRankZero) {
  std::string text = replaced(kFormB, R"("rank_id":"0")", R"("rank_id":"x")");
  text = replaced(text, R"("rank_id":"1")", R"("rank_id":"0")");
  text = replaced(text, R"("rank_id":"x")", R"("rank_id":"1")");
  const RankTable table = parse_rank_table(text, "t.json");
  EXPECT_EQ(table.master(), 1);
  EXPECT_TRUE(has_note(table, "the master is the server of rank 0, 10.0.0.2"));
}

TEST(RankTable, AcceptsWhatOthersLimit) {
  RankTable big;
  int rank = 0;
  for (int s = 0; s < 70; ++s) {
    Server server{.server_id = "10.1.0." + std::to_string(s + 1)};
    for (int d = 0; d <= s % 40; ++d)
      server.devices.push_back({.device_id = d, .rank_id = rank++, .weight = 0.5 + d});
    big.servers.push_back(server);
  }
  const RankTable table = parse_rank_table(to_json(big), "t.json");
  EXPECT_EQ(table.world_size, rank);
  EXPECT_GT(rank, 512);
  EXPECT_EQ(table.device_of_rank(rank - 1).weight, 0.5 + 29);
  EXPECT_EQ(to_json(table), to_json(big));
}

TEST(RankTable, AcceptsWithNotes) {
  std::string text = replaced(kFormB, R"("server_count":"2")", R"("server_count":2,"extra":1)");
  text = replaced(text, R"("rank_id":"1")", R"("rank_id":"1","weight":2.5,"spare":false)");
  const RankTable table = parse_rank_table(text, "t.json");
  EXPECT_TRUE(has_note(table, "server_count: a number"));
  EXPECT_TRUE(has_note(table, "\"extra\": unknown key, ignored"));
  EXPECT_EQ(table.device_of_rank(1).weight, 2.5);
}

constexpr const char* kWithSpare = R"({"server_count":"3","weight":"auto","server_list":[
  {"server_id":"10.0.0.3","spare":true},
  {"server_id":"10.0.0.1","device":[{"device_id":"0","rank_id":"0"}]},
  {"server_id":"10.0.0.2","device":[{"device_id":"0","rank_id":"1","weight":2}]}]})";

TEST(RankTable, SparesAndMeasuredWeights) {
  const RankTable table = parse_rank_table(kWithSpare, "t.json");
  EXPECT_EQ(table.world_size, 2);
  EXPECT_EQ(table.master(), 1);
  EXPECT_TRUE(table.servers[0].spare);
  EXPECT_FALSE(table.servers[1].spare);
  EXPECT_TRUE(table.has_auto_weights());
  EXPECT_TRUE(table.device_of_rank(0).auto_weight);
  EXPECT_FALSE(table.device_of_rank(1).auto_weight);
  const RankTable again = parse_rank_table(to_json(table), "t.json");
  EXPECT_EQ(again.digest(), table.digest());
  EXPECT_TRUE(again.servers[0].spare && again.device_of_rank(0).auto_weight);
  EXPECT_NE(parse_rank_table(replaced(kWithSpare, R"(,"weight":"auto")", ""), "t.json").digest(),
            table.digest());
}

TEST(RankTable, ASparesRankIsNotUsed) {
  const RankTable table = parse_rank_table(
      replaced(kWithSpare, R"("spare":true)",
               R"("device":[{"device_id":"0","device_ip":"10.20.0.3","rank_id":"2",)"
               R"("spare":true}])"),
      "t.json");
  EXPECT_EQ(table.world_size, 2);
  ASSERT_TRUE(table.servers[0].spare);
  EXPECT_EQ(table.servers[0].devices.at(0).device_ip, "10.20.0.3");
  EXPECT_TRUE(has_note(table, "server_list[0].device[0].rank_id: not used"));
  EXPECT_EQ(parse_rank_table(to_json(table), "t.json").digest(), table.digest());
}

TEST(RankTable, DigestIsOfTheContent) {
  const RankTable table = parse_rank_table(kFormB, "t.json");
  EXPECT_EQ(table.digest(),
            parse_rank_table(replaced(kFormB, R"("2")", "2"), "u.json").digest());
  EXPECT_NE(table.digest(),
            parse_rank_table(replaced(kFormB, "10.20.0.3", "10.20.0.4"), "t.json").digest());
  EXPECT_NE(table.digest(),
            parse_rank_table(replaced(kFormB, R"("rank_id":"1")", R"("rank_id":"1","weight":2)"),
                             "t.json").digest());
}

struct BadCase {
  std::string from, to, message;
};

class BadRankTable : public ::testing::TestWithParam<BadCase> {};

TEST_P(BadRankTable, IsRefusedByName) {
  const std::string message = message_of(replaced(kFormB, GetParam().from, GetParam().to));
  EXPECT_NE(message.find(GetParam().message), std::string::npos) << message;
  EXPECT_NE(message.find("rank table t.json cannot be used (1 problem)"), std::string::npos)
      << message;
}

INSTANTIATE_TEST_SUITE_P(
    All, BadRankTable,
    ::testing::Values(
        BadCase{R"("server_count":"2")", R"("server_count":"3")",
                "t.json: server_count: differs from the length of server_list, found 3, "
                "expected 2"},
        BadCase{R"("server_count":"2",)", "", "server_count: key missing"},
        BadCase{R"("server_count":"2")", R"("server_count":"2x")",
                "server_count: not an integer, found \"2x\""},
        BadCase{R"("server_count":"2")", R"("server_count":"99999999999")", "not an integer"},
        BadCase{R"("server_count":"2")", R"("server_count":-2)", "not an integer, found -2"},
        BadCase{R"("version":"1.0")", R"("version":"2.0")",
                "version: unexpected value, found \"2.0\", expected \"1.0\""},
        BadCase{R"("completed")", R"("initializing")", "the table is not finished"},
        BadCase{R"("rank_id":"1")", R"("rank_id":"1x")",
                "server_list[1].device[0].rank_id: not an integer, found \"1x\""},
        BadCase{R"("rank_id":"1")", R"("rank_id":1)",
                "server_list[1].device[0].rank_id: wrong type, found 1, expected a string such as "
                "\"0\". Fix: put the value in quotation marks"},
        BadCase{R"("rank_id":"0")", R"("rank_id":"00")", "rank_id: not an integer, found \"00\""},
        BadCase{R"("rank_id":"1")", R"("rank_id":"-1")", "not an integer, found \"-1\""},
        BadCase{R"(,"rank_id":"1")", "", "server_list[1].device[0].rank_id: key missing"},
        BadCase{R"("device_id":"0")", R"("device_id":"1024")", "out of range, found 1024"},
        BadCase{R"("device_ip":"10.20.0.3")", R"("device_ip":"-.-.-.-")",
                "no address was configured"},
        BadCase{R"("device_ip":"10.20.0.3")", R"("device_ip":"0.0.0.0")", "all-zero"},
        BadCase{R"("device_ip":"10.20.0.3")", R"("device_ip":"10.20.0.2")",
                "server_list[1].device[0].device_ip: address of a device on another server, found "
                "10.20.0.2, already at server_list[0].device[0].device_ip"},
        BadCase{R"("server_id":"10.0.0.2")", R"("server_id":"host-b")",
                "server_list[1].server_id: not an IP address, found \"host-b\""},
        BadCase{R"("container_ip":"10.0.0.2")", R"("container_ip":"::")", "all-zero"},
        BadCase{R"("container_ip":"10.0.0.2")", R"("container_ip":"10.0.0.1")",
                "server_list[1].container_ip: server listed twice, found 10.0.0.1, already at "
                "server_list[0]"},
        BadCase{R"("container_ip":"10.0.0.2")", R"("container_ip":7)", "container_ip: wrong type"},
        BadCase{R"("rank_id":"1")", R"("rank_id":"1","weight":0)", "weight: wrong value, found 0"},
        BadCase{R"("rank_id":"1")", R"("rank_id":"1","weight":"2")", "weight: wrong value"},
        BadCase{R"("server_count")", R"("weight":2,"server_count")", "weight: wrong value, found 2"},
        BadCase{R"("rank_id":"1")", R"("rank_id":"1","spare":"yes")", "spare: wrong type"},
        BadCase{R"({"device_id":"0","device_ip":"10.20.0.3","rank_id":"1"})", "",
                "server_list[1].device: wrong number of devices, found 0, expected 1 to 1024"},
        BadCase{R"({"device_id":"0","device_ip":"10.20.0.3","rank_id":"1"})", "5",
                "server_list[1].device[0]: wrong type, found 5"},
        BadCase{R"("status":"completed"})", "", "not valid JSON at line 7"}));

TEST(RankTable, NamesGapsAndDoublesAllAtOnce) {
  std::string text = replaced(kFormA, R"("rank_id":"1")", R"("rank_id":"2")");
  text = replaced(text, R"("rank_id":"3")", R"("rank_id":"7")");
  text = replaced(text, R"("device_id":"1","device_ip":"10.10.100.23")",
                  R"("device_id":"0","device_ip":"10.10.100.23")");
  const std::string message = message_of(text);
  EXPECT_NE(message.find("server_list[1].device[0].rank_id: rank given twice, found 2, already at "
                         "server_list[0].device[1].rank_id"),
            std::string::npos) << message;
  EXPECT_NE(message.find("no rank 1, 3, expected 0 to 3"), std::string::npos) << message;
  EXPECT_NE(message.find("rank_id: rank out of range, found 7"), std::string::npos) << message;
  EXPECT_NE(message.find("device listed twice on one server, found 0"), std::string::npos)
      << message;
  EXPECT_NE(message.find("(4 problems)"), std::string::npos) << message;
}

TEST(RankTable, RefusesHostileTexts) {
  EXPECT_NE(message_of("").find("file is empty"), std::string::npos);
  EXPECT_NE(message_of(" \n").find("file is empty"), std::string::npos);
  EXPECT_NE(message_of("[1]").find("the whole file"), std::string::npos);
  EXPECT_NE(message_of(std::string(100000, '[')).find("nested deeper"), std::string::npos);
  EXPECT_NE(message_of("{}").find("server_list: key missing"), std::string::npos);
  std::string many = R"({"server_count":"1024","server_list":[0)";
  for (int i = 1; i < 1024; ++i) many += ",0";
  EXPECT_LT(message_of(many + "]}").size(), 20000u);
}

TEST(RankTable, FindsOwnServer) {
  const RankTable table = parse_rank_table(kFormB, "t.json");
  EXPECT_EQ(find_own_server(table, "10.0.0.2", "", "t.json"), 1);
  EXPECT_EQ(find_own_server(table, "", "10.0.0.1", "t.json"), 0);
  try {
    (void)find_own_server(table, "10.0.0.9", "", "t.json");
    FAIL();
  } catch (const Error& e) {
    const std::string message = e.what();
    EXPECT_NE(message.find("MIES_CONTAINER_IP 10.0.0.9"), std::string::npos) << message;
    EXPECT_NE(message.find("127.0.0.1 (lo)"), std::string::npos) << message;
    EXPECT_NE(message.find("one of 10.0.0.1, 10.0.0.2"), std::string::npos) << message;
  }
}

TEST(RankTable, TwoContainersOfOneHost) {
  const RankTable table =
      parse_rank_table(replaced(kFormB, R"("server_id":"10.0.0.2")", R"("server_id":"10.0.0.1")"),
                       "t.json");
  EXPECT_TRUE(has_note(table, "told apart by container_ip"));
  EXPECT_EQ(find_own_server(table, "10.0.0.2", "10.0.0.1", "t.json"), 1);
  EXPECT_THROW((void)find_own_server(table, "", "10.0.0.1", "t.json"), Error);
}

TEST(RankTable, FileRulesAndContentAreShownTogether) {
  const std::string path =
      (std::filesystem::temp_directory_path() / "rank_table_test.json").string();
  std::ofstream(path) << replaced(kFormB, R"("rank_id":"1")", R"("rank_id":"2")");
  ASSERT_EQ(::chmod(path.c_str(), 0644), 0);
  try {
    (void)load_rank_table(path);
    FAIL();
  } catch (const Error& e) {
    const std::string message = e.what();
    EXPECT_NE(message.find("found mode 0644"), std::string::npos) << message;
    EXPECT_NE(message.find("no rank 1"), std::string::npos) << message;
  }
  std::ofstream(path) << kFormB;
  ASSERT_EQ(::chmod(path.c_str(), 0640), 0);
  EXPECT_EQ(load_rank_table(path).world_size, 2);
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace phalanx::cluster
