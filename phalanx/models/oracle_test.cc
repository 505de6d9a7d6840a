// Logits against those of the public transformers implementation in fp32 (tests/oracle).

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "phalanx/base/json.h"
#include "phalanx/models/test_ranks.h"

namespace phalanx::models {
namespace {

namespace fs = std::filesystem;

const std::string kData = PHALANX_ORACLE_DIR;

struct Reference {
  std::vector<int32_t> tokens;
  std::vector<float> logits;  // [tokens, vocab]
  double std = 0;
};

Reference read_reference(const std::string& name) {
  const std::string directory = kData + "/" + name;
  const nlohmann::json json = read_json_file(directory + "/reference.json");
  const std::string raw = read_text_file(directory + "/logits.f32", 1 << 20);
  Reference reference{.tokens = json["tokens"].get<std::vector<int32_t>>(),
                      .std = json["std"].get<double>()};
  reference.logits.resize(raw.size() / sizeof(float));
  std::memcpy(reference.logits.data(), raw.data(), raw.size());
  return reference;
}

// Largest difference of a teacher-forced run, in standard deviations of the reference.
double difference(const Reference& reference, const std::string& directory, ops::Isa isa) {
  const auto logits = run_steps({.directory = directory, .isa = isa},
                                {{.slices = {{.sequence = 0, .tokens = reference.tokens}}}});
  EXPECT_EQ(logits.size(), reference.logits.size());
  double worst = 0;
  for (size_t i = 0; i < std::min(logits.size(), reference.logits.size()); ++i) {
    if (!std::isfinite(logits[i])) return INFINITY;
    worst = std::max(worst, std::abs(static_cast<double>(logits[i]) - reference.logits[i]));
  }
  return worst / reference.std;
}

// In fp32 only the order of sums differs from transformers; with bf16 activations each named edge
// rounds to 8 bits.
double allowed(const std::string& name) { return name.ends_with("bf16") ? 0.04 : 1e-4; }

class Oracle : public ::testing::TestWithParam<std::tuple<std::string, ops::Isa>> {};

TEST_P(Oracle, AgreesWithTransformers) {
  const auto& [name, isa] = GetParam();
  const double worst = difference(read_reference(name), kData + "/" + name, isa);
  RecordProperty("worst_in_std", std::to_string(worst));
  EXPECT_LE(worst, allowed(name));
}

INSTANTIATE_TEST_SUITE_P(
    All, Oracle,
    ::testing::Combine(::testing::Values("untied_f32", "tied_bf16", "biases_f16", "linear_f16",
                                         "llama3_bf16", "nine_heads_f32", "mistral_window_f32"),
                       ::testing::ValuesIn(ops::available_isas())),
    [](const auto& info) {
      return std::get<0>(info.param) + "_" + std::string(ops::isa_name(std::get<1>(info.param)));
    });

// A feature that could be dropped without a difference would not be tested above.
class Feature : public ::testing::TestWithParam<std::tuple<std::string, std::string>> {};

TEST_P(Feature, MattersToTheLogits) {
  const auto& [name, patch_text] = GetParam();
  const fs::path directory =
      fs::temp_directory_path() / ("phalanx-feature-" + std::to_string(::getpid()));
  fs::remove_all(directory);
  fs::create_directory(directory);
  for (const auto& file : fs::directory_iterator(kData + "/" + name))
    if (file.path().filename() != "config.json")
      fs::create_symlink(file.path(), directory / file.path().filename());
  nlohmann::json config = read_json_file(kData + "/" + name + "/config.json");
  config.merge_patch(nlohmann::json::parse(patch_text));
  std::ofstream(directory / "config.json") << config;
  const double worst = difference(read_reference(name), directory, ops::Isa::kRef);
  fs::remove_all(directory);
  EXPECT_GT(worst, 5 * allowed(name));
}

INSTANTIATE_TEST_SUITE_P(
    All, Feature,
    ::testing::Values(
        std::tuple("biases_f16", R"({"attention_bias": false})"),
        std::tuple("biases_f16", R"({"mlp_bias": false})"),
        std::tuple("linear_f16", R"({"rope_parameters": {"rope_type": "default"}})"),
        std::tuple("linear_f16", R"({"rope_parameters": {"factor": 3.0}})"),
        std::tuple("llama3_bf16", R"({"rope_scaling": null})"),
        std::tuple("llama3_bf16", R"({"rope_scaling": {"factor": 2.0}})"),
        std::tuple("llama3_bf16", R"({"rope_scaling": {"original_max_position_embeddings": 16}})"),
        std::tuple("untied_f32", R"({"rope_parameters": {"rope_theta": 20000.0}})"),
        std::tuple("untied_f32", R"({"rms_norm_eps": 0.01})"),
        std::tuple("untied_f32", R"({"tie_word_embeddings": true})"),
        std::tuple("mistral_window_f32", R"({"sliding_window": 8})"),
        std::tuple("mistral_window_f32", R"({"sliding_window": null})")));

}  // namespace
}  // namespace phalanx::models
