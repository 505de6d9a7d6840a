// Every number format: logits against the formula applied in fp32 (tests/oracle/make_quantised.py),
// equal tokens for any number of ranks, and refusals.

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "phalanx/base/json.h"
#include "phalanx/models/test_ranks.h"
#include "phalanx/weights/checkpoint.h"

namespace phalanx::models {
namespace {

namespace fs = std::filesystem;
const std::string kData = std::string(PHALANX_ORACLE_DIR) + "/../quantised/";

const std::string kNames[] = {
    "ms_w8a8_f32",      "ms_w8a8_packed_f16", "ms_w8a8_dynamic_f32", "ms_w8a16_f32",
    "ct_w8a8_dynamic_f32", "ct_w8a8_static_f32", "ct_w8a16_bf16",     "ct_w8a16_int_f32",
    "ct_w8a16_g32_f32", "ct_w4a16_g32_bf16",  "ct_w4a16_order_f32",   "fp8_blocks_f32",
    "awq_f16",          "gptq_order_f16",     "gptq8_v2_f16"};

std::vector<int32_t> tokens_of(const std::string& name) {
  return read_json_file(kData + name + "/reference.json")["tokens"].get<std::vector<int32_t>>();
}

class Formats : public ::testing::TestWithParam<std::tuple<std::string, ops::Isa>> {};

TEST_P(Formats, AgreesWithTheFormula) {
  const auto& [name, isa] = GetParam();
  const nlohmann::json reference = read_json_file(kData + name + "/reference.json");
  const std::string raw = read_text_file(kData + name + "/logits.f32", 1 << 20);
  std::vector<float> expected(raw.size() / sizeof(float));
  std::memcpy(expected.data(), raw.data(), raw.size());
  const auto logits = run_steps({.directory = kData + name, .isa = isa},
                                {{.slices = {{.sequence = 0, .tokens = tokens_of(name)}}}});
  ASSERT_EQ(logits.size(), expected.size());
  double worst = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    ASSERT_TRUE(std::isfinite(logits[i])) << i;
    worst = std::max(worst, std::abs(static_cast<double>(logits[i]) - expected[i]));
  }
  worst /= reference["std"].get<double>();
  RecordProperty("worst_in_std", std::to_string(worst));
  EXPECT_LE(worst, name.ends_with("bf16") ? 0.04 : 1e-4);
}

INSTANTIATE_TEST_SUITE_P(All, Formats,
                         ::testing::Combine(::testing::ValuesIn(kNames),
                                            ::testing::ValuesIn(ops::available_isas())),
                         [](const auto& info) {
                           return std::get<0>(info.param) + "_" +
                                  std::string(ops::isa_name(std::get<1>(info.param)));
                         });

// 32 greedy tokens after the first eight of the reference's.
std::vector<int32_t> greedy(const std::string& name, std::vector<double> weights) {
  std::vector<int32_t> tokens = tokens_of(name);
  tokens.resize(8);
  const size_t prompt = tokens.size();
  for (int i = 0; i < 32; ++i) {
    // Whole prompts again: what is compared is the arithmetic, not the cache.
    const auto logits = run_steps({.directory = kData + name, .isa = ops::available_isas().back(),
                                   .weights = weights},
                                  {{.slices = {{.sequence = 0, .tokens = tokens}},
                                    .sample_all = false}});
    tokens.push_back(static_cast<int32_t>(
        std::max_element(logits.begin(), logits.end()) - logits.begin()));
  }
  return {tokens.begin() + static_cast<long>(prompt), tokens.end()};
}

class FormatRanks : public ::testing::TestWithParam<std::string> {};

TEST_P(FormatRanks, ChangeNoBitAndNoToken) {
  const std::string& name = GetParam();
  const auto isa = ops::available_isas().back();
  const std::vector<TestStep> steps = {{.slices = {{.sequence = 0, .tokens = tokens_of(name)}}}};
  const auto alone = run_steps({.directory = kData + name, .isa = isa}, steps);
  for (const std::vector<double>& weights : {std::vector<double>{1, 1}, std::vector<double>{1, 2, 1},
                                             std::vector<double>{1, 1, 1, 1, 1}})
    EXPECT_EQ(run_steps({.directory = kData + name, .isa = isa, .weights = weights, .threads = 2},
                        steps),
              alone)
        << weights.size() << " ranks";
  // In chunks and as a batch of one token each.
  std::vector<TestStep> chunks;
  const auto tokens = tokens_of(name);
  for (size_t at = 0; at < tokens.size(); at += at < 20 ? 7 : 1)
    chunks.push_back({.slices = {{.sequence = 0,
                                  .begin = static_cast<int64_t>(at),
                                  .tokens = {tokens.begin() + static_cast<long>(at),
                                             tokens.begin() + static_cast<long>(std::min(
                                                 tokens.size(), at + (at < 20 ? 7 : 1)))}}}});
  EXPECT_EQ(run_steps({.directory = kData + name, .isa = isa}, chunks), alone);
}

INSTANTIATE_TEST_SUITE_P(All, FormatRanks, ::testing::ValuesIn(kNames),
                         [](const auto& info) { return info.param; });

TEST(FormatTokens, AreTheSameForAnyNumberOfRanks) {
  for (const char* name : {"ms_w8a8_f32", "ct_w4a16_g32_bf16", "fp8_blocks_f32"}) {
    const auto alone = greedy(name, {1});
    EXPECT_GE(std::set<int32_t>(alone.begin(), alone.end()).size(), 8U) << name;
    EXPECT_EQ(greedy(name, {1, 1}), alone) << name;
    EXPECT_EQ(greedy(name, {1, 1, 1}), alone) << name;
    EXPECT_EQ(greedy(name, {1, 1, 1, 1, 1}), alone) << name;
  }
}

TEST(FormatNames, AreReported) {
  EXPECT_EQ(read_model_info(kData + "ms_w8a8_f32").formats->summary(), "W8A8 (11 layers)");
  EXPECT_EQ(read_model_info(kData + "ct_w4a16_g32_bf16").formats->summary(),
            "W4A16 g32 (pack-quantized) (14 layers)");
  EXPECT_EQ(read_model_info(kData + "gptq_order_f16").formats->summary(),
            "gptq int4 g32 act-order (14 layers)");
}

// A copy of a checkpoint with one file to be changed.
class Damaged {
 public:
  explicit Damaged(const std::string& name) {
    directory_ = (fs::temp_directory_path() / ("phalanx-format-" + std::to_string(::getpid()))).string();
    fs::remove_all(directory_);
    fs::copy(kData + name, directory_);
  }
  ~Damaged() { fs::remove_all(directory_); }
  Damaged(const Damaged&) = delete;
  Damaged& operator=(const Damaged&) = delete;

  void patch(const std::string& file, const std::string& merge) const {
    nlohmann::json json = read_json_file(directory_ + "/" + file);
    json.merge_patch(nlohmann::json::parse(merge));
    std::ofstream(directory_ + "/" + file) << json;
  }
  // Overwrites bytes of a tensor.
  void write(const std::string& tensor, int64_t at, const void* bytes, size_t size) const {
    const weights::Checkpoint checkpoint(directory_);
    const weights::TensorEntry* entry = checkpoint.find(tensor);
    ASSERT_NE(entry, nullptr) << tensor;
    std::fstream file(checkpoint.path_of(*entry), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(entry->offset + at);
    file.write(static_cast<const char*>(bytes), static_cast<std::streamsize>(size));
  }
  // Changes text of the header to text of equal length.
  void edit_header(const std::string& from, const std::string& to) const {
    ASSERT_EQ(from.size(), to.size());
    const std::string path = directory_ + "/model.safetensors";
    std::string bytes = read_text_file(path, 1 << 24);
    const size_t at = bytes.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    bytes.replace(at, from.size(), to);
    std::ofstream(path, std::ios::binary) << bytes;
  }
  [[nodiscard]] std::string refusal() const {
    try {
      check_checkpoint(directory_);
      (void)run_steps({.directory = directory_}, {{.slices = {{.sequence = 0, .tokens = {1, 2}}}}});
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  }

 private:
  std::string directory_;
};

#define EXPECT_SAYS(text, part) \
  EXPECT_NE((text).find(part), std::string::npos) << (text) << "\n  lacks: " << (part)

TEST(FormatRefusal, FormatsWithoutKernelsAreNamed) {
  {
    const Damaged d("ms_w8a8_f32");
    d.patch("quant_model_description.json",
            R"({"model.layers.0.mlp.gate_proj.weight": "W4A8_DYNAMIC",
                "model.layers.0.mlp.up_proj.weight": "W8A8_MIX"})");
    EXPECT_SAYS(d.refusal(), "number format without kernels");
    EXPECT_SAYS(d.refusal(), "found W4A8_DYNAMIC");
    EXPECT_SAYS(d.refusal(), "found W8A8_MIX");
  }
  const Damaged d("ct_w8a8_dynamic_f32");
  for (const auto& [patch, says] : {
           std::pair(R"({"quantization_config": {"quant_method": "bitsandbytes"}})",
                     "quantization_config.quant_method: number format without kernels, found bitsandbytes"),
           std::pair(R"({"quantization_config": {"quant_method": "fp8"}})",
                     "fp8 without blocks of known size"),
           std::pair(R"({"quantization_config": {"quant_method": "awq", "bits": 3}})",
                     "bits: number of bits without kernels, found 3, expected 4"),
           std::pair(R"({"quantization_config": {"quant_method": "compressed-tensors",
                        "kv_cache_scheme": {"num_bits": 8}}})", "kv_cache_scheme"),
           std::pair(R"({"quantization_config": {"config_groups": {"group_0": {"weights":
                        {"num_bits": 4, "strategy": "group", "group_size": 32}}}}})",
                     "int-quantized: weights")}) {
    const Damaged copy("ct_w8a8_dynamic_f32");
    copy.patch("config.json", patch);
    EXPECT_SAYS(copy.refusal(), says);
  }
}

TEST(FormatRefusal, ADescriptionThatContradictsTheTensors) {
  {
    const Damaged d("ms_w8a8_f32");
    d.patch("quant_model_description.json",
            R"({"model.layers.0.mlp.gate_proj.weight": "FLOAT",
                "model.layers.0.mlp.up_proj.weight": null,
                "model.layers.1.self_attn.q_proj.weight": "W8A16"})");
    const std::string says = d.refusal();
    EXPECT_SAYS(says, "the description contradicts the tensor");
    EXPECT_SAYS(says, "tensor model.layers.0.mlp.gate_proj.weight: the description contradicts the tensor, found i8");
    EXPECT_SAYS(says, "int8 tensor that the description does not name");
    EXPECT_SAYS(says, "(2 problems)");
  }
  {
    const Damaged d("ms_w8a8_f32");
    d.patch("quant_model_description.json", R"({"model.layers.1.self_attn.q_proj.weight": "W8A16"})");
    EXPECT_SAYS(d.refusal(), "tensor model.layers.1.self_attn.q_proj.weight_scale");
  }
  {
    const Damaged d("ct_w8a8_dynamic_f32");
    d.patch("config.json", R"({"quantization_config": {"ignore": ["lm_head", "re:.*down_proj"]}})");
    EXPECT_SAYS(d.refusal(), "model.layers.0.mlp.down_proj.weight");
    EXPECT_SAYS(d.refusal(), "ignore names it");
  }
  {
    const Damaged d("ct_w4a16_g32_bf16");
    d.patch("config.json", R"({"quantization_config": {"config_groups": {"group_0": {"weights":
                               {"group_size": 16}}}}})");
    EXPECT_SAYS(d.refusal(), "tensor of another shape");
    EXPECT_SAYS(d.refusal(), "model.layers.0.self_attn.q_proj.weight_scale");
  }
  {
    const Damaged d("ms_w8a8_f32");
    fs::remove(fs::path(fs::temp_directory_path() / ("phalanx-format-" + std::to_string(::getpid()))) /
               "quant_model_description.json");
    EXPECT_SAYS(d.refusal(), "description of the quantisation missing");
    EXPECT_SAYS(d.refusal(), "quant_model_description_w8a8.json");
  }
}

TEST(FormatRefusal, ScalesOfTheWrongLength) {
  const Damaged d("ct_w8a16_int_f32");
  // [96,1] becomes [48,2]: as many bytes, another shape.
  d.edit_header(R"("model.layers.0.self_attn.q_proj.weight_scale":{"dtype":"F32","shape":[96,1])",
                R"("model.layers.0.self_attn.q_proj.weight_scale":{"dtype":"F32","shape":[48,2])");
  EXPECT_SAYS(d.refusal(), "tensor model.layers.0.self_attn.q_proj.weight_scale");
  EXPECT_SAYS(d.refusal(), "found [48, 2], expected [96, 1]");
}

TEST(FormatRefusal, ScalesThatAreNoNumbersAllAtOnce) {
  const float nan = std::nanf("");
  const float infinite = INFINITY;
  {
    const Damaged d("ct_w8a16_int_f32");
    d.write("model.layers.0.self_attn.q_proj.weight_scale", 4 * 5, &nan, 4);
    d.write("model.layers.0.self_attn.q_proj.weight_scale", 4 * 7, &infinite, 4);
    d.write("model.layers.1.mlp.down_proj.weight_scale", 0, &infinite, 4);
    const std::string says = d.refusal();
    EXPECT_SAYS(says, "scale that is not a finite number");
    EXPECT_SAYS(says, "model.safetensors: layer model.layers.0.self_attn.q_proj");
    EXPECT_SAYS(says, "2 of them, the first nan in row 5");
    EXPECT_SAYS(says, "layer model.layers.1.mlp.down_proj");
    EXPECT_SAYS(says, "(2 problems)");
  }
  {
    const Damaged d("ms_w8a8_f32");
    const uint16_t zero = 0;
    d.write("model.layers.1.self_attn.o_proj.input_scale", 0, &zero, 2);
    EXPECT_SAYS(d.refusal(), "scale of activations that cannot be used");
    EXPECT_SAYS(d.refusal(), "model.layers.1.self_attn.o_proj");
  }
  {
    const Damaged d("gptq_order_f16");
    const int32_t group = 3;
    d.write("model.layers.0.self_attn.q_proj.g_idx", 0, &group, 4);
    EXPECT_SAYS(d.refusal(), "group index out of range");
  }
}

}  // namespace
}  // namespace phalanx::models
