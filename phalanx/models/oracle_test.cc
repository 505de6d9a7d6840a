// Logits against those of the public transformers implementation in fp32 (tests/oracle).

#include <gtest/gtest.h>

#include "phalanx/models/test_oracle.h"

namespace phalanx::models {
namespace {

// In fp32 only the order of sums differs from transformers; with bf16 activations each named edge
// rounds to 8 bits.
double allowed(const std::string& name) { return name.ends_with("bf16") ? 0.04 : 1e-4; }

class Oracle : public ::testing::TestWithParam<std::tuple<std::string, ops::Isa>> {};

TEST_P(Oracle, AgreesWithTransformers) {
  const auto& [name, isa] = GetParam();
  const double worst = difference(read_reference(name), {.directory = oracle_directory(name), .isa = isa});
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
  const TestDirectory directory("feature");
  copy_checkpoint(oracle_directory(name), directory.path(), nlohmann::json::parse(patch_text), false);
  const double worst = difference(read_reference(name), {.directory = directory.path()});
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
