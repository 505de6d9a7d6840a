// Damaged config.json of the server: examined to the end, with findings or without. What is read is
// bounded. PHALANX_FUZZ_SECONDS; `make fuzz`.

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <iostream>

#include "apps/config.h"
#include "apps/config_make.h"
#include "phalanx/base/error.h"
#include "phalanx/base/fuzz.h"

namespace phalanx::apps {
namespace {

TEST(ServerConfigFuzz, ExaminedToTheEnd) {
  char path[] = "/tmp/phalanx-fuzz-XXXXXX";
  ASSERT_NE(::mkdtemp(path), nullptr);
  const std::string folder = path;
  const auto put = [&](const std::string& name, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(folder + "/" + name).parent_path());
    std::ofstream(folder + "/" + name, std::ios::trunc) << text;
    ::chmod((folder + "/" + name).c_str(), 0640);
  };
  put("weights/config.json",
      R"({"model_type":"llama","num_attention_heads":9,"max_position_embeddings":4096})");
  const std::string seed = make_config_json({.model = folder + "/weights", .name = "demo"});
  ServeArguments arguments;
  arguments.config_file = folder + "/conf/config.json";
  int64_t clean = 0;
  const int64_t tried = fuzz({seed}, [&](const std::string& text, int64_t number) {
    SCOPED_TRACE(number);
    put("conf/config.json", text);
    Problems problems;
    Problems warnings;
    const NodeConfig config =
        examine_node_config(arguments, {{"MINDIE_LLM_HOME_PATH", folder}}, problems, warnings);
    if (!problems.empty()) return;
    ++clean;
    EXPECT_GE(config.server.max_link_num, 1);
    EXPECT_LE(config.server.max_link_num, 4096);
    EXPECT_LE(config.table.world_size, 1 << 20);
  });
  std::cout << tried << " files, " << clean << " without a finding\n";
  EXPECT_GT(tried, 20);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace phalanx::apps
