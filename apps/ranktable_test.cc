#include "apps/ranktable.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "phalanx/cluster/rank_table.h"

namespace phalanx::apps {
namespace {

class RanktableCommand : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "ranktable-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
    file_ = directory_ + "/ranktable.json";
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  int run(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "ranktable");
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    ::testing::internal::CaptureStdout();
    ::testing::internal::CaptureStderr();
    const int status = ranktable_main(static_cast<int>(argv.size()), argv.data());
    out_ = ::testing::internal::GetCapturedStdout();
    err_ = ::testing::internal::GetCapturedStderr();
    return status;
  }

  std::string directory_, file_, out_, err_;
};

TEST_F(RanktableCommand, MakesWhatItAccepts) {
  ASSERT_EQ(run({"make", "--hosts", "localhost:2,127.0.0.2,[::1]:3", "--weights", "1,2,1,1,1,0.5",
                 "-o", file_}),
            0) << err_;
  struct stat st {};
  ASSERT_EQ(::stat(file_.c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777, 0640u);
  const cluster::RankTable table = cluster::load_rank_table(file_);
  EXPECT_EQ(table.world_size, 6);
  EXPECT_EQ(table.servers[0].address(), "127.0.0.1");
  EXPECT_EQ(table.servers[2].address(), "::1");
  EXPECT_EQ(table.device_of_rank(1).weight, 2);
  EXPECT_TRUE(table.notes.empty());
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory_), {}), 1);
  EXPECT_EQ(run({"check", file_}), 0);
  EXPECT_NE(out_.find("good: 3 servers, 6 ranks; master 127.0.0.1"), std::string::npos) << out_;
  EXPECT_EQ(run({"show", file_}), 0);
  EXPECT_NE(out_.find("ranks 3, 4, 5"), std::string::npos) << out_;
}

TEST_F(RanktableCommand, PrintsFormB) {
  ASSERT_EQ(run({"make", "--hosts", "127.0.0.1,127.0.0.2", "--devices", "2"}), 0);
  EXPECT_EQ(cluster::parse_rank_table(out_, "stdout").world_size, 4);
  EXPECT_LT(out_.find("\"version\""), out_.find("\"server_count\": \"2\""));
}

TEST_F(RanktableCommand, ShowsTheLayoutOfAModel) {
  std::ofstream(directory_ + "/config.json") << R"({"model_type": "llama",
    "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 2, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49152, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16"})";
  ASSERT_EQ(run({"make", "--hosts", "127.0.0.1,127.0.0.2", "-o", file_}), 0) << err_;
  ASSERT_EQ(run({"show", file_, "--model", directory_}), 0) << err_;
  EXPECT_NE(out_.find("9 query heads, 3 KV heads"), std::string::npos) << out_;
  EXPECT_NE(out_.find("predicted balance: "), std::string::npos) << out_;
  // Every query head and vocabulary row has one owner.
  EXPECT_NE(out_.find(" 0-24575 "), std::string::npos) << out_;
  EXPECT_NE(out_.find(" 24576-49151 "), std::string::npos) << out_;
  ASSERT_EQ(run({"make", "--hosts", "127.0.0.1:10", "-o", file_}), 0) << err_;
  EXPECT_EQ(run({"show", file_, "--model", directory_}), 1);
  EXPECT_NE(err_.find("found 10 ranks, expected at most 9"), std::string::npos) << err_;
}

TEST_F(RanktableCommand, MeasuredWeightsAndSpares) {
  ASSERT_EQ(run({"make", "--hosts", "127.0.0.1,127.0.0.2", "--weights", "auto", "--spares",
                 "127.0.0.3", "-o", file_}), 0) << err_;
  const cluster::RankTable table = cluster::load_rank_table(file_);
  EXPECT_EQ(table.world_size, 2);
  EXPECT_TRUE(table.device_of_rank(0).auto_weight && table.device_of_rank(1).auto_weight);
  EXPECT_TRUE(table.servers.at(2).spare);
  ASSERT_EQ(run({"show", file_}), 0) << err_;
  EXPECT_NE(out_.find("weights by measurement at the start"), std::string::npos) << out_;
  EXPECT_NE(out_.find("127.0.0.3            spare"), std::string::npos) << out_;
  ASSERT_EQ(run({"make", "--hosts", "127.0.0.1,127.0.0.2", "--weights", "2,auto"}), 0) << err_;
  EXPECT_NE(out_.find("\"weight\": \"auto\""), std::string::npos) << out_;
  for (const char* bad : {"0,1", "two,1", "1x,1"}) {
    EXPECT_EQ(run({"make", "--hosts", "127.0.0.1,127.0.0.2", "--weights", bad}), 1) << bad;
    EXPECT_NE(err_.find("expected a number above 0, or auto"), std::string::npos) << err_;
  }
}

TEST_F(RanktableCommand, RefusesBadInput) {
  EXPECT_EQ(run({"make", "--hosts", "127.0.0.1:0"}), 1);
  EXPECT_NE(err_.find("--hosts: found '127.0.0.1:0'"), std::string::npos) << err_;
  EXPECT_EQ(run({"make", "--hosts", "127.0.0.1,127.0.0.1"}), 1);
  EXPECT_NE(err_.find("server listed twice"), std::string::npos) << err_;
  EXPECT_EQ(run({"make", "--hosts", "no-such-host.invalid"}), 1);
  EXPECT_NE(err_.find("cannot be resolved"), std::string::npos) << err_;
  EXPECT_EQ(run({"make", "--hosts", "127.0.0.1", "--weights", "1,2"}), 1);
  EXPECT_NE(err_.find("--weights: found 2 numbers, expected one per rank, 1"), std::string::npos);
  EXPECT_EQ(run({"make", "--hosts", "127.0.0.1", "-o", directory_ + "/none/x"}), 1);
  EXPECT_NE(err_.find("cannot write"), std::string::npos) << err_;
  EXPECT_EQ(run({"make"}), 2);
  EXPECT_EQ(run({"check", directory_ + "/absent"}), 1);
  EXPECT_NE(err_.find("No such file"), std::string::npos) << err_;
  std::ofstream(file_) << "{}";
  ::chmod(file_.c_str(), 0666);
  EXPECT_EQ(run({"check", file_}), 1);
  EXPECT_NE(err_.find("(3 problems)"), std::string::npos) << err_;
}

}  // namespace
}  // namespace phalanx::apps
