// Damaged adapter_config.json and adapter_model.safetensors: read or refused, with every tensor
// inside the file. PHALANX_FUZZ_SECONDS per parser; `make fuzz`.

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iostream>

#include "phalanx/base/fuzz.h"
#include "phalanx/weights/gguf_testing.h"
#include "phalanx/weights/lora_files.h"

namespace phalanx::weights {
namespace {

namespace fs = std::filesystem;

const std::vector<AdaptedModule> kModules = {
    {.name = "model.layers.0.self_attn.q_proj", .rows = 3, .k = 5},
    {.name = "model.layers.1.mlp.down_proj", .rows = 4, .k = 2}};

const std::string kConfig =
    R"({"peft_type":"LORA","r":2,"lora_alpha":4.5,"target_modules":["q_proj","down_proj"],)"
    R"("use_rslora":true,"bias":"none","rank_pattern":{"layers.1.mlp.down_proj":1},)"
    R"("alpha_pattern":{".*q_proj":3},"init_lora_weights":"gaussian","use_dora":false,)"
    R"("layers_to_transform":[0,1],"modules_to_save":null,"loftq_config":{}})";

std::string model_file() {
  std::string header = "{";
  int64_t at = 0;
  const auto add = [&](const std::string& name, int64_t rows, int64_t columns) {
    header += (at > 0 ? "," : "") + ("\"base_model.model." + name) +
              ".weight\":{\"dtype\":\"F32\",\"shape\":[" + std::to_string(rows) + "," +
              std::to_string(columns) + "],\"data_offsets\":[" + std::to_string(at) + ",";
    at += rows * columns * 4;
    header += std::to_string(at) + "]}";
  };
  add("model.layers.0.self_attn.q_proj.lora_A", 2, 5);
  add("model.layers.0.self_attn.q_proj.lora_B", 3, 2);
  add("model.layers.1.mlp.down_proj.lora_A", 1, 2);
  add("model.layers.1.mlp.down_proj.lora_B", 4, 1);
  header += "}";
  return GgufBytes::number<uint64_t>(header.size()) + header +
         std::string(static_cast<size_t>(at), '\1');
}

class AdapterFuzz : public ::testing::Test {
 protected:
  AdapterFuzz()
      : directory_(fs::path("/dev/shm") / ("phalanx-adapter-fuzz-" + std::to_string(::getpid()))) {
    fs::remove_all(directory_);
    fs::create_directory(directory_);
    write("adapter_config.json", kConfig);
    write("adapter_model.safetensors", model_file());
  }
  ~AdapterFuzz() override { fs::remove_all(directory_); }
  void write(const std::string& name, const std::string& bytes) const {
    std::ofstream(directory_ / name, std::ios::binary) << bytes;
  }
  // True if the adapter was taken; then all of it is read.
  bool taken() const {
    Problems problems;
    const LoraFiles files(
        directory_.string(), kModules,
        [](std::string_view) { return std::string("no such layer"); }, 16, problems);
    if (!problems.empty()) return false;
    for (const AdaptedModule& module : kModules) {
      const LoraFiles::Pair* pair = files.find(module.name);
      if (pair == nullptr) continue;
      EXPECT_GE(pair->rank, 1);
      EXPECT_LE(pair->rank, 16);
      EXPECT_TRUE(pair->scale > 0 && pair->scale < 1e7);
      for (const TensorEntry* entry : {&pair->a, &pair->b}) {
        std::vector<std::byte> bytes(static_cast<size_t>(entry->bytes));
        files.read_rows(*entry, 0, entry->rows(), bytes.data());
      }
    }
    return true;
  }
  fs::path directory_;
};

TEST_F(AdapterFuzz, ConfigurationReadOrRefused) {
  ASSERT_TRUE(taken());
  int64_t good = 0;
  const int64_t tried = fuzz({kConfig}, [&](const std::string& bytes, int64_t number) {
    SCOPED_TRACE(number);
    write("adapter_config.json", bytes);
    good += taken() ? 1 : 0;
  });
  std::cout << tried << " configurations, " << good << " taken\n";
  EXPECT_GT(tried, 10);
}

TEST_F(AdapterFuzz, WeightsReadOrRefused) {
  int64_t good = 0;
  const int64_t tried = fuzz({model_file()}, [&](const std::string& bytes, int64_t number) {
    SCOPED_TRACE(number);
    write("adapter_model.safetensors", bytes);
    good += taken() ? 1 : 0;
  });
  std::cout << tried << " files, " << good << " taken\n";
  EXPECT_GT(tried, 10);
}

}  // namespace
}  // namespace phalanx::weights
