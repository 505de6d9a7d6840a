#include "phalanx/weights/quant_formats.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "phalanx/weights/gguf_testing.h"

namespace phalanx::weights {
namespace {

namespace fs = std::filesystem;

// A checkpoint of one tensor of one layer, as far as formats look at it.
class Formats : public ::testing::Test {
 protected:
  Formats() { fs::create_directory(directory_); }
  ~Formats() override { fs::remove_all(directory_); }

  std::shared_ptr<const quant::Formats> read(const std::string& tensor, const std::string& dtype,
                                             const std::string& quantization) {
    const std::string header =
        fmt::format(R"({{"a.{}":{{"dtype":"{}","shape":[1,4],"data_offsets":[0,{}]}}}})", tensor, dtype,
                    dtype == "I32" ? 16 : 4);
    std::ofstream(directory_ / "model.safetensors", std::ios::binary)
        << GgufBytes::number<uint64_t>(header.size()) << header << std::string(dtype == "I32" ? 16 : 4, '\1');
    std::ofstream(directory_ / "config.json") << R"({"quantization_config":)" << quantization << "}";
    problems_ = {};
    return read_quant_formats(directory_.string(), problems_);
  }
  std::string compressed(const std::string& format, const std::string& weights,
                         const std::string& activations) {
    return fmt::format(R"({{"quant_method":"compressed-tensors","format":"{}","config_groups":{{"g":{{)"
                       R"("targets":["Linear"],"weights":{},"input_activations":{}}}}}}})",
                       format, weights, activations);
  }
  [[nodiscard]] std::string found() const {
    return problems_.empty() ? "" : problems_.list().front().what + ", found " + problems_.list().front().found;
  }

  const fs::path directory_ = fs::temp_directory_path() / fmt::format("phalanx-formats-{}", ::getpid());
  Problems problems_;
};

// An order of columns that is described is wanted, so that a g_idx that is not there is told.
TEST_F(Formats, ADescribedOrderOfColumnsIsWanted) {
  const auto gptq = [&](bool order) {
    const auto formats = read("qweight", "I32",
                              fmt::format(R"({{"quant_method":"gptq","bits":4,"group_size":32,"desc_act":{}}})", order));
    return formats->find("a")->order;
  };
  EXPECT_TRUE(gptq(true));
  EXPECT_FALSE(gptq(false));
  const auto packed = [&](const std::string& actorder) {
    const auto formats = read("weight_packed", "I32",
                              compressed("pack-quantized",
                                         R"({"num_bits":4,"strategy":"group","group_size":32,"actorder":)" +
                                             actorder + "}",
                                         "null"));
    return formats->find("a")->order;
  };
  for (const char* actorder : {R"("group")", R"("GROUP")", R"("dynamic")", "true"})
    EXPECT_TRUE(packed(actorder)) << actorder;
  for (const char* actorder : {R"("weight")", R"("static")", "false", "null"})
    EXPECT_FALSE(packed(actorder)) << actorder;
}

TEST_F(Formats, WhatWouldBeLeftOutIsRefused) {
  (void)read("weight", "F8_E4M3",
             compressed("float-quantized", R"({"num_bits":8,"type":"float","strategy":"channel"})",
                        R"({"num_bits":8,"type":"float","strategy":"token","dynamic":true})"));
  EXPECT_NE(found().find("number format without kernels, found float-quantized: weights"), std::string::npos)
      << found();
  EXPECT_NE(read("weight", "F8_E4M3",
                 compressed("float-quantized", R"({"num_bits":8,"type":"float","strategy":"channel"})", "null")),
            nullptr);
  (void)read("weight", "I8",
             compressed("int-quantized",
                        R"({"num_bits":8,"strategy":"group","group_size":32,"actorder":"group"})", "null"));
  EXPECT_NE(found().find("number format without kernels, found int-quantized: weights"), std::string::npos)
      << found();
}

}  // namespace
}  // namespace phalanx::weights
