// LoRA adapters: logits against those of merged weights (tests/oracle/make_adapters.py), the same
// bits for every cut, batch and chunk, and what is said of adapters that cannot be served.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "phalanx/base/sanitizer.h"
#include "phalanx/models/adapter.h"
#include "phalanx/models/test_oracle.h"

namespace phalanx::models {
namespace {

const std::string kAdapters = PHALANX_ORACLE_DIR "/../adapters/";
const std::string kQuantised = PHALANX_ORACLE_DIR "/../quantised/";
const std::string kNineHeads = "nine_heads_f32";

struct AdapterReference {
  std::string base;
  std::vector<int32_t> tokens;
  std::vector<float> logits;
  double std = 0;
};

AdapterReference reference_of(const std::string& name) {
  const nlohmann::json json = read_json_file(kAdapters + name + "/reference.json");
  const std::string raw = read_text_file(kAdapters + name + "/logits.f32", 1 << 20);
  AdapterReference reference{.base = json["base"].get<std::string>(),
                             .tokens = json["tokens"].get<std::vector<int32_t>>(),
                             .std = json["std"].get<double>()};
  reference.logits.resize(raw.size() / sizeof(float));
  std::memcpy(reference.logits.data(), raw.data(), raw.size());
  return reference;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class AdapterOracle : public ::testing::TestWithParam<std::tuple<std::string, ops::Isa>> {};

TEST_P(AdapterOracle, AgreesWithMergedWeights) {
  const auto& [name, isa] = GetParam();
  const AdapterReference reference = reference_of(name);
  // In fp32 only the order of sums differs; bf16 bases are widened, which is exact.
  const TestDirectory widened("adapter-oracle");
  copy_checkpoint(oracle_directory(reference.base), widened.path(), nlohmann::json::object(), true);
  RunOptions options{.directory = widened.path(), .isa = isa, .adapters = {kAdapters + name}};
  const auto logits =
      run_steps(options, {{.slices = {{.tokens = reference.tokens, .adapter = 0}}}});
  const double worst =
      difference(Reference{.logits = reference.logits, .std = reference.std}, logits);
  RecordProperty("worst_in_std", std::to_string(worst));
  EXPECT_LE(worst, 1e-4);
  // The base alone is far from it.
  const auto base = run_steps(options, {{.slices = {{.tokens = reference.tokens}}}});
  EXPECT_GT(difference(Reference{.logits = reference.logits, .std = reference.std}, base), 0.2);
}

// With bf16 activations each named edge rounds to 8 bits.
TEST(AdapterBf16, AgreesWithMergedWeights) {
  for (const ops::Isa isa : ops::available_isas()) {
    const AdapterReference reference = reference_of("all_linear_tied_bf16");
    const auto logits = run_steps({.directory = oracle_directory(reference.base),
                                   .isa = isa,
                                   .adapters = {kAdapters + "all_linear_tied_bf16"}},
                                  {{.slices = {{.tokens = reference.tokens, .adapter = 0}}}});
    EXPECT_LE(difference(Reference{.logits = reference.logits, .std = reference.std}, logits),
              0.12);
  }
}

INSTANTIATE_TEST_SUITE_P(All, AdapterOracle,
                         ::testing::Combine(::testing::Values("all_r4", "attention_r5", "patterns",
                                                              "all_linear_tied_bf16", "qwen3_r3",
                                                              "biases_r6", "mixtral_attention"),
                                            ::testing::ValuesIn(ops::available_isas())),
                         [](const auto& info) {
                           return std::get<0>(info.param) + "_" +
                                  std::string(ops::isa_name(std::get<1>(info.param)));
                         });

std::vector<int32_t> tokens_of(int sequence, int64_t count) {
  std::vector<int32_t> tokens;
  uint32_t state = 4711U + static_cast<uint32_t>(sequence) * 977U;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525U + 1013904223U;
    tokens.push_back(static_cast<int32_t>(state >> 8) % 60);
  }
  return tokens;
}

// Prompts of the base and of adapters side by side, then a step of decoding for all of them.
std::vector<TestStep> mixed(int count, int adapters, int64_t longest) {
  TestStep prefill;
  TestStep decode;
  for (int s = 0; s < count; ++s) {
    const int64_t length = 1 + (s * 37) % longest;
    auto tokens = tokens_of(s, length + 1);
    const int32_t adapter = s % (adapters + 1) - 1;
    decode.slices.push_back(
        {.sequence = s, .begin = length, .tokens = {tokens.back()}, .adapter = adapter});
    tokens.pop_back();
    prefill.slices.push_back({.sequence = s, .tokens = std::move(tokens), .adapter = adapter});
  }
  return {prefill, decode};
}

class AdapterRanks : public ::testing::TestWithParam<ops::Isa> {};

TEST_P(AdapterRanks, MixedBatchEqualsEachAloneOnAnyCut) {
  constexpr int kSequences = 6;
  const auto steps = mixed(kSequences, 3, 150);
  RunOptions options{
      .directory = oracle_directory(kNineHeads),
      .isa = GetParam(),
      .sequences = kSequences,
      .adapters = {kAdapters + "all_r4", kAdapters + "attention_r5", kAdapters + "patterns"}};
  const auto together = run_steps(options, steps);
  // Each alone, its prompt in two pieces.
  std::vector<float> prefill;
  std::vector<float> decode;
  for (int s = 0; s < kSequences; ++s) {
    const auto at = static_cast<size_t>(s);
    const TestSlice& whole = steps[0].slices[at];
    const auto half = static_cast<long>(whole.tokens.size() / 2);
    std::vector<TestStep> own;
    if (half > 0) {
      TestSlice first = whole;
      first.tokens.resize(static_cast<size_t>(half));
      own.push_back({.slices = {first}});
    }
    TestSlice second = whole;
    second.begin = half;
    second.tokens.erase(second.tokens.begin(), second.tokens.begin() + half);
    own.push_back({.slices = {second}});
    own.push_back({.slices = {steps[1].slices[at]}});
    const auto alone = run_steps(options, own);
    const auto vocab = static_cast<long>(alone.size() / (whole.tokens.size() + 1));
    prefill.insert(prefill.end(), alone.begin(), alone.end() - vocab);
    decode.insert(decode.end(), alone.end() - vocab, alone.end());
  }
  prefill.insert(prefill.end(), decode.begin(), decode.end());
  EXPECT_TRUE(same_bits(together, prefill));

  for (const std::vector<double>& weights :
       {std::vector<double>{1, 1}, {1, 3, 2}, {1000, 1, 1, 1}, {1, 1, 1, 1, 1, 1, 1, 1, 1}}) {
    RunOptions cut = options;
    cut.weights = weights;
    EXPECT_TRUE(same_bits(run_steps(cut, steps), together)) << weights.size();
  }
  RunOptions threads = options;
  threads.threads = 3;
  EXPECT_TRUE(same_bits(run_steps(threads, steps), together));
}

TEST_P(AdapterRanks, TheBaseKeepsItsBits) {
  const auto steps = mixed(4, 1, 40);
  RunOptions options{.directory = oracle_directory("tied_bf16"),
                     .isa = GetParam(),
                     .sequences = 4,
                     .adapters = {kAdapters + "all_linear_tied_bf16"}};
  const auto with = run_steps(options, steps);
  std::vector<TestStep> plain = steps;
  for (TestStep& step : plain)
    for (TestSlice& slice : step.slices) slice.adapter = -1;
  options.adapters.clear();
  const auto without = run_steps(options, plain);
  ASSERT_EQ(with.size(), without.size());
  size_t rows = 0;
  for (const TestStep& step : steps)
    for (const TestSlice& slice : step.slices) rows += slice.tokens.size();
  const size_t vocab = with.size() / rows;
  size_t row = 0;
  bool any_other = false;
  for (const TestStep& step : steps) {
    for (const TestSlice& slice : step.slices) {
      for (size_t i = 0; i < slice.tokens.size(); ++i, ++row) {
        const bool equal =
            std::memcmp(&with[row * vocab], &without[row * vocab], vocab * sizeof(float)) == 0;
        if (slice.adapter < 0) {
          EXPECT_TRUE(equal) << row;
        } else {
          any_other |= !equal;
        }
      }
    }
  }
  EXPECT_TRUE(any_other);
}

INSTANTIATE_TEST_SUITE_P(All, AdapterRanks, ::testing::ValuesIn(ops::available_isas()),
                         [](const auto& info) { return std::string(ops::isa_name(info.param)); });

// An adapter of any model, of random values; B times `b_scale`.
void write_adapter(const ModelInfo& info, const std::string& directory, float b_scale) {
  std::filesystem::create_directories(directory);
  std::ofstream(directory + "/adapter_config.json")
      << R"({"peft_type":"LORA","r":3,"lora_alpha":6,"target_modules":"all-linear"})";
  std::vector<weights::NewTensor> entries;
  for (const weights::AdaptedModule& module : adapted_modules(info)) {
    const std::string stem = "base_model.model." + module.name;
    entries.push_back({.name = stem + ".lora_A.weight", .shape = {3, module.k}});
    entries.push_back({.name = stem + ".lora_B.weight", .shape = {module.rows, 3}});
  }
  weights::SafetensorsWriter writer(directory + "/adapter_model.safetensors", entries);
  uint32_t state = 99;
  for (size_t i = 0; i < entries.size(); ++i) {
    std::vector<float> values(static_cast<size_t>(entries[i].shape[0] * entries[i].shape[1]));
    for (float& value : values) {
      state = state * 1664525U + 1013904223U;
      value = (static_cast<float>(state >> 8) * 0x1p-23F - 1.0F) * (i % 2 == 1 ? b_scale : 0.3F);
    }
    writer.append(std::as_bytes(std::span(values)));
  }
  writer.finish();
}

class AdapterFormats : public ::testing::TestWithParam<std::string> {};

// Beside weights of every storage, gate and up of two formats among them.
TEST_P(AdapterFormats, QuantisedBasesTakeAdapters) {
  const std::string base = kQuantised + GetParam();
  const ModelInfo info = read_model_info(base);
  const TestDirectory directory("adapter-formats");
  write_adapter(info, directory.path() + "/zero", 0);
  write_adapter(info, directory.path() + "/some", 0.3F);
  const auto isa = ops::default_isa();
  const RunOptions options{.directory = base,
                           .isa = isa,
                           .sequences = 4,
                           .adapters = {directory.path() + "/zero", directory.path() + "/some"}};
  const TestStep prefill{.slices = {{.sequence = 0, .tokens = tokens_of(0, 9), .adapter = 0}}};
  TestStep plain = prefill;
  plain.slices[0].adapter = -1;
  const auto expected = run_steps(options, {plain});
  EXPECT_TRUE(same_bits(run_steps(options, {prefill}), expected));  // nothing added changes nothing
  TestStep adapted = prefill;
  adapted.slices[0].adapter = 1;
  EXPECT_FALSE(same_bits(run_steps(options, {adapted}), expected));
  const auto steps = mixed(4, 2, 12);
  const auto alone = run_steps(options, steps);
  RunOptions cut = options;
  cut.weights = {1, 2};
  EXPECT_TRUE(same_bits(run_steps(cut, steps), alone));
}

INSTANTIATE_TEST_SUITE_P(All, AdapterFormats,
                         ::testing::Values("ms_w8a8_f32", "ms_w8a8_dynamic_f32",
                                           "ct_w4a16_order_f32", "gptq_order_f16", "fp8_blocks_f32",
                                           "llama_ms_anti_outlier"),
                         [](const auto& info) { return info.param; });

// --- What is said of others.

class AdapterRefusals : public ::testing::Test {
 protected:
  AdapterRefusals() : info_(read_model_info(oracle_directory(kNineHeads))) {
    for (const char* name : {"adapter_config.json", "adapter_model.safetensors"})
      std::filesystem::copy_file(kAdapters + "all_r4/" + name, directory_.path() + "/" + name);
  }
  void patch(const std::string& text) const {
    const std::string path = directory_.path() + "/adapter_config.json";
    nlohmann::json config = read_json_file(path);
    config.merge_patch(nlohmann::json::parse(text));
    std::ofstream(path) << config;
  }
  [[nodiscard]] std::string refusal(int64_t max_rank = 64) const {
    try {
      (void)check_adapter(info_, directory_.path(), max_rank);
      return "";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), Code::kInvalidArgument);
      return e.what();
    }
  }
  ModelInfo info_;
  TestDirectory directory_{"adapter-refusals"};
};

#define EXPECT_SAYS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST_F(AdapterRefusals, AcceptedAsItIs) {
  EXPECT_EQ(refusal(), "");
  const AdapterFacts facts = check_adapter(info_, directory_.path(), 64);
  EXPECT_EQ(facts.max_rank, 4);
  EXPECT_EQ(facts.digest.size(), 64U);
  patch(R"({"lora_alpha": 9})");
  EXPECT_NE(check_adapter(info_, directory_.path(), 64).digest, facts.digest);
}

TEST_F(AdapterRefusals, EverythingThatIsNoPlainLora) {
  patch(R"({"use_dora": true, "bias": "all", "modules_to_save": ["lm_head"], "lora_bias": true,
            "init_lora_weights": "pissa", "task_type": "SEQ_CLS", "peft_type": "IA3",
            "fan_in_fan_out": true, "trainable_token_indices": [1], "some_new_method": {"x": 1}})");
  const std::string text = refusal();
  for (const char* part :
       {"DoRA cannot be served", "use_dora", "trained biases", "whole modules trained",
        "a trained bias of lora_B", "weights were changed at its start", "adapter for another task",
        "not a LoRA adapter", "transposed weights", "trained token embeddings", "some_new_method",
        "merge_and_unload"})
    EXPECT_SAYS(text, part);
}

TEST_F(AdapterRefusals, TensorsMissingAndOfAnotherShapeAllAtOnce) {
  patch(R"({"r": 5})");
  const std::string text = refusal();
  EXPECT_SAYS(text, "model.layers.0.self_attn.q_proj.lora_A.weight");
  EXPECT_SAYS(text, "model.layers.1.mlp.down_proj.lora_B.weight");
  EXPECT_SAYS(text, "found [4, 72], expected [5, 72] (rank 5)");
  patch(R"({"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]})");
  EXPECT_SAYS(refusal(), "tensor of a layer that is not adapted");
  EXPECT_SAYS(refusal(3), "rank above the limit");
  std::filesystem::copy_file(kAdapters + "attention_r5/adapter_model.safetensors",
                             directory_.path() + "/adapter_model.safetensors",
                             std::filesystem::copy_options::overwrite_existing);
  patch(R"({"r": 5, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]})");
  EXPECT_SAYS(refusal(), "tensor missing");
  EXPECT_SAYS(refusal(), "model.layers.1.mlp.up_proj.lora_A.weight");
}

TEST_F(AdapterRefusals, ConfigurationsOutOfRange) {
  patch(R"({"r": 0, "lora_alpha": -1, "target_modules": "(unclosed"})");
  const std::string text = refusal();
  EXPECT_SAYS(text, "rank that cannot be used");
  EXPECT_SAYS(text, "scale that cannot be used");
  EXPECT_SAYS(text, "regular expression that cannot be used");
  patch(R"({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", 3],
            "rank_pattern": {"q_proj": 1.5}})");
  EXPECT_SAYS(refusal(), "3 in the list");
  EXPECT_SAYS(refusal(), "rank_pattern.q_proj");
  patch(R"({"target_modules": "(.*)*x", "rank_pattern": null})");  // no trap: time is linear
  EXPECT_SAYS(refusal(), "not adapted");
  patch(R"({"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 2, ".*q_proj": 3}})");
  EXPECT_SAYS(refusal(), "two patterns say different things");
  std::ofstream(directory_.path() + "/adapter_config.json") << "{\"r\": ";
  EXPECT_SAYS(refusal(), "adapter_config.json");
}

TEST_F(AdapterRefusals, FilesThatAreNotThere) {
  std::filesystem::rename(directory_.path() + "/adapter_model.safetensors",
                          directory_.path() + "/adapter_model.bin");
  EXPECT_SAYS(refusal(), "adapter_model.bin, which is Python code");
  std::filesystem::remove(directory_.path() + "/adapter_config.json");
  EXPECT_SAYS(refusal(), "adapter_config.json");
  std::filesystem::remove_all(directory_.path());
  EXPECT_SAYS(refusal(), "no adapter");
}

TEST_F(AdapterRefusals, LayersThatCannotBeAdapted) {
  info_ = read_model_info(oracle_directory("mixtral"));
  EXPECT_SAYS(refusal(), "no such layer in this model");
  info_ = read_model_info(oracle_directory("deepseek_v3"));
  EXPECT_SAYS(refusal(), "compressed attention (MLA)");
  info_ = read_model_info(oracle_directory("qwen3_moe"));
  EXPECT_SAYS(refusal(), "a part of a mixture of experts");
}

}  // namespace
}  // namespace phalanx::models
