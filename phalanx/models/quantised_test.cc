// Every number format: logits against the formula applied in fp32 (tests/oracle/make_quantised.py),
// equal tokens for any number of ranks, and refusals.

#include <fmt/format.h>
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
#include "phalanx/base/sanitizer.h"
#include "phalanx/models/kv_format.h"
#include "phalanx/models/test_ranks.h"
#include "phalanx/models/test_table.h"
#include "phalanx/weights/checkpoint.h"

namespace phalanx::models {
namespace {

namespace fs = std::filesystem;
const std::string kData = std::string(PHALANX_ORACLE_DIR) + "/../quantised/";

const std::string kNames[] = {
    "ms_w8a8_f32",      "ms_w8a8_packed_f16", "ms_w8a8_dynamic_f32", "ms_w8a16_f32",
    "ct_w8a8_dynamic_f32", "ct_w8a8_static_f32", "ct_w8a16_bf16",     "ct_w8a16_int_f32",
    "ct_w8a16_g32_f32", "ct_w4a16_g32_bf16",  "ct_w4a16_order_f32",   "fp8_blocks_f32",
    "awq_f16",          "gptq_order_f16",     "gptq8_v2_f16",
    // Experts, latent attention, norms with biases, int8 KV.
    "mixtral_ct_w8a8",  "qwen3_moe_gptq",     "qwen3_moe_fp8",        "deepseek_v3_fp8",
    "deepseek_v3_ms_w8a8", "kimi_k2_ct_w4a16", "glm4_moe_ms_w8a16",   "llama_ms_anti_outlier",
    "llama_ms_pdmix",   "llama_ms_c8",        "llama_kv_int8"};

RunOptions options_of(const std::string& name, ops::Isa isa) {
  return {.directory = kData + name, .isa = isa,
          .kv = name == "llama_kv_int8" ? KvDtype::kInt8 : KvDtype::kCheckpoint};
}

std::vector<int32_t> tokens_of(const std::string& name) {
  return read_json_file(kData + name + "/reference.json")["tokens"].get<std::vector<int32_t>>();
}

class Formats : public ::testing::TestWithParam<std::tuple<std::string, ops::Isa>> {};

// Largest difference from the formula's logits in standard deviations.
double difference_of(const std::string& name, ops::Isa isa) {
  const nlohmann::json reference = read_json_file(kData + name + "/reference.json");
  const std::string raw = read_text_file(kData + name + "/logits.f32", 1 << 20);
  std::vector<float> expected(raw.size() / sizeof(float));
  std::memcpy(expected.data(), raw.data(), raw.size());
  const auto logits = run_steps(options_of(name, isa),
                                {{.slices = {{.sequence = 0, .tokens = tokens_of(name)}}}});
  EXPECT_EQ(logits.size(), expected.size());
  double worst = 0;
  for (size_t i = 0; i < std::min(logits.size(), expected.size()); ++i) {
    if (!std::isfinite(logits[i])) return INFINITY;
    worst = std::max(worst, std::abs(static_cast<double>(logits[i]) - expected[i]));
  }
  return worst / reference["std"].get<double>();
}

double allowed_of(const std::string& name) { return name.ends_with("bf16") ? 0.04 : 1e-4; }

TEST_P(Formats, AgreesWithTheFormula) {
  const auto& [name, isa] = GetParam();
  const double worst = difference_of(name, isa);
  RecordProperty("worst_in_std", std::to_string(worst));
  EXPECT_LE(worst, allowed_of(name));
}

INSTANTIATE_TEST_SUITE_P(All, Formats,
                         ::testing::Combine(::testing::ValuesIn(kNames),
                                            ::testing::ValuesIn(ops::available_isas())),
                         [](const auto& info) {
                           return std::get<0>(info.param) + "_" +
                                  std::string(ops::isa_name(std::get<1>(info.param)));
                         });

class FormatRanks : public ::testing::TestWithParam<std::string> {};

TEST_P(FormatRanks, ChangeNoBitAndNoToken) {
  const std::string& name = GetParam();
  if (kThreadSanitizer && name != "ms_w8a8_f32" && name != "mixtral_ct_w8a8" &&
      name != "deepseek_v3_ms_w8a8")
    GTEST_SKIP() << "three formats are enough for threads";
  const auto isa = ops::default_isa();
  const std::vector<int32_t> reference = tokens_of(name);
  std::vector<int32_t> prompt;
  struct Generated {
    std::vector<float> logits;
    std::vector<int32_t> tokens;
  };
  const auto generate = [&](std::vector<double> weights, int64_t moe_ep, int threads) {
    Generated result;
    RunOptions options = options_of(name, isa);
    options.weights = std::move(weights);
    options.moe_ep = moe_ep;
    options.threads = threads;
    options.generate = 32;
    options.generated = &result.tokens;
    result.logits = run_steps(options, {{.slices = {{.sequence = 0, .tokens = prompt}}}});
    return result;
  };
  // The first eight tokens of the reference after which the model does not repeat itself soon.
  Generated alone;
  const auto distinct = [&] {
    return std::set<int32_t>(alone.tokens.begin(), alone.tokens.end()).size();
  };
  for (size_t at = 0; at + 8 <= reference.size() && distinct() < 8; ++at) {
    prompt.assign(reference.begin() + static_cast<long>(at),
                  reference.begin() + static_cast<long>(at + 8));
    alone = generate({1}, 1, 1);
  }
  EXPECT_GE(distinct(), 8U);
  const auto expect_same = [&](const Generated& other, size_t ranks, int64_t moe_ep) {
    EXPECT_EQ(other.tokens, alone.tokens) << ranks << " ranks, moe_ep " << moe_ep;
    EXPECT_EQ(other.logits, alone.logits) << ranks << " ranks, moe_ep " << moe_ep;
  };
  for (const std::vector<double>& weights : {std::vector<double>{1, 1}, std::vector<double>{1, 2, 1},
                                             std::vector<double>{1, 1, 1, 1, 1}})
    expect_same(generate(weights, 1, 2), weights.size(), 1);
  if (read_model_info(kData + name).experts.count > 0)
    for (const size_t moe_ep : {2U, 3U})
      for (const size_t moe_tp : {1U, 2U})
        expect_same(generate(std::vector<double>(moe_ep * moe_tp, 1.0),
                             static_cast<int64_t>(moe_ep), 1),
                    moe_ep * moe_tp, static_cast<int64_t>(moe_ep));
  // All at once, and in pieces.
  std::vector<int32_t> tokens = prompt;
  tokens.insert(tokens.end(), alone.tokens.begin(), alone.tokens.end() - 1);
  EXPECT_EQ(run_steps(options_of(name, isa), {{.slices = {{.sequence = 0, .tokens = tokens}}}}),
            alone.logits);
  std::vector<TestStep> pieces;
  for (size_t at = 0; at < tokens.size(); at += 7)
    pieces.push_back({.slices = {{.sequence = 0,
                                  .begin = static_cast<int64_t>(at),
                                  .tokens = {tokens.begin() + static_cast<long>(at),
                                             tokens.begin() + static_cast<long>(std::min(
                                                 tokens.size(), at + 7))}}}});
  EXPECT_EQ(run_steps(options_of(name, isa), pieces), alone.logits);
}

INSTANTIATE_TEST_SUITE_P(All, FormatRanks, ::testing::ValuesIn(kNames),
                         [](const auto& info) { return info.param; });

TEST(FormatNames, AreReported) {
  EXPECT_EQ(read_model_info(kData + "ms_w8a8_f32").formats->summary(), "W8A8 (11 layers)");
  EXPECT_EQ(read_model_info(kData + "ct_w4a16_g32_bf16").formats->summary(),
            "W4A16 g32 (pack-quantized) (14 layers)");
  EXPECT_EQ(read_model_info(kData + "gptq_order_f16").formats->summary(),
            "gptq int4 g32 act-order (14 layers)");
  EXPECT_EQ(read_model_info(kData + "llama_ms_pdmix").formats->summary(),
            "W8A8_MIX (PDMIX, as W8A8_DYNAMIC) (14 layers)");
  EXPECT_EQ(read_model_info(kData + "llama_ms_anti_outlier").formats->summary(),
            "W8A8 (8 layers), W8A8_DYNAMIC (6 layers), 4 norms with biases");
}

// --- The table -----------------------------------------------------------------------------------

// Types of msModelSlim's descriptions that are refused by name.
constexpr const char* kNotSupported[] = {"W4A8_DYNAMIC", "W8A8S",    "W8A8SC",
                                         "W16A16S",      "W16A16SC", "FAQuant"};

// What FormatRanks runs.
TEST(FormatTable, IsThatOfTheDocumentation) {
  std::string text =
      "| family | number formats | checkpoint | largest difference from the formula (standard "
      "deviations) | ranks with equal bits | moe_ep × moe_tp |\n|---|---|---|---|---|---|\n";
  for (const std::string& name : kNames) {
    const ModelInfo info = read_model_info(kData + name);
    const RunOptions options = options_of(name, ops::default_isa());
    const std::string kv = kv_format_text(info, options.kv);
    const double worst = difference_of(name, options.isa);
    EXPECT_LE(worst, allowed_of(name)) << name;
    text += fmt::format("| `{}` | {}{} | {} | {:.0e} | 1, 2, 3, 5 | {} |\n", info.model_type,
                        info.formats == nullptr ? "float" : info.formats->summary(),
                        kv.starts_with("int8") ? "; KV " + kv : "", name, worst,
                        info.experts.count > 0 ? "2×1, 2×2, 3×1, 3×2" : "–");
  }
  for (const char* name : kNotSupported)
    text += fmt::format("| all | {} | – | not supported, refused by name | – | – |\n", name);
  text += "| all | per-tensor fp8, fp8 activations, bitsandbytes, AWQ `gemv` | – | not supported, "
          "refused by name | – | – |\n";
  text += "| with latent attention | C8 | – | not supported, refused by name | – | – |\n";
  hold_table("formats", text);
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
  for (const std::string type : kNotSupported) {
    const Damaged d("ms_w8a8_f32");
    d.patch("quant_model_description.json",
            fmt::format(R"({{"model.layers.0.mlp.gate_proj.weight": "{}"}})", type));
    EXPECT_SAYS(d.refusal(), "number format without kernels");
    EXPECT_SAYS(d.refusal(), "found " + type);
  }
  {
    const Damaged d("ms_w8a8_f32");
    d.patch("quant_model_description.json", R"({"fa_quant_type": "FAQuant"})");
    EXPECT_SAYS(d.refusal(), "quantised attention without kernels");
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

TEST(FormatRefusal, OfKvScalesThatCannotBeUsed) {
  const uint16_t zero = 0;
  const uint16_t nan = 0x7fc0;  // bf16
  {
    const Damaged d("llama_ms_c8");
    d.write("model.layers.0.self_attn.k_proj.kv_cache_scale", 2 * 5, &zero, 2);
    d.write("model.layers.1.self_attn.v_proj.kv_cache_scale", 2 * 7, &nan, 2);
    d.write("model.layers.1.self_attn.v_proj.kv_cache_offset", 2 * 9, &nan, 2);
    const std::string says = d.refusal();
    EXPECT_SAYS(says, "tensor model.layers.0.self_attn.k_proj.kv_cache_scale: scale that cannot be used");
    EXPECT_SAYS(says, "1 of them, the first 0 at 5");
    EXPECT_SAYS(says, "tensor model.layers.1.self_attn.v_proj.kv_cache_scale");
    EXPECT_SAYS(says, "v_proj.kv_cache_offset: offset that cannot be used");
    EXPECT_SAYS(says, "(3 problems)");
  }
  {
    const Damaged d("llama_ms_c8");
    d.patch("quant_model_description_w8a16.json", R"({"kv_cache_type": "C4"})");
    EXPECT_SAYS(d.refusal(), "kv_cache_type: quantised KV cache without kernels, found C4, expected C8");
  }
  {
    const Damaged d("ms_w8a8_f32");  // C8 without scales
    d.patch("quant_model_description.json", R"({"kv_cache_type": "C8"})");
    EXPECT_SAYS(d.refusal(), "tensor model.layers.0.self_attn.k_proj.kv_cache_scale: tensor is absent");
    EXPECT_SAYS(d.refusal(), "tensor model.layers.1.self_attn.v_proj.kv_cache_scale: tensor is absent");
  }
  {
    const Damaged d("deepseek_v3_ms_w8a8");
    d.patch("config.json", R"({"quantization_config": {"kv_quant_type": "C8"}})");
    EXPECT_SAYS(d.refusal(), "quantised KV cache (C8) of compressed keys and values has no kernels");
  }
}

TEST(FormatRefusal, ExpressionsThatCannotBeUsedEndSoon) {
  const auto says = [](const std::string& expression) {
    const Damaged d("ct_w8a8_dynamic_f32");
    d.patch("config.json", nlohmann::json{{"quantization_config", {{"ignore", {expression}}}}}.dump());
    return d.refusal();
  };
  EXPECT_SAYS(says("re:(unclosed"), "quantization_config.ignore: expression that cannot be used");
  EXPECT_SAYS(says("re:(a)\\1"), "expression that cannot be used");
  EXPECT_SAYS(says("re:" + std::string(5000, '.')), "of at most 4000 characters");
  // Years with backtracking.
  EXPECT_EQ(says("re:^(([a-z])+.)+[A-Z]([a-z])+$"), "");
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
