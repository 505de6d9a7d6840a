// Every family against transformers, and against itself on any number of ranks and in any layout of
// its experts. docs/models.md shows what passed; PHALANX_WRITE_MODELS_TABLE names the file to write
// the table to.

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <functional>
#include <set>

#include "phalanx/base/sanitizer.h"
#include "phalanx/models/test_oracle.h"
#include "phalanx/models/test_table.h"

namespace phalanx::models {
namespace {

// In fp32 only the order of sums differs from transformers; with bf16 activations each named edge
// rounds to 8 bits.
constexpr double kAllowedF32 = 1e-4;
constexpr double kAllowedBf16 = 0.04;
constexpr size_t kPrompt = 8;  // tokens before the greedy ones
constexpr int64_t kGreedy = 32;

struct Case {
  std::string model_type;  // of the table
  std::string name;        // of the directory
  std::string shows;
};

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {"llama", "llama3", "llama3 rotary scaling"},
      {"llama", "linear", "linear rotary scaling, biases everywhere"},
      {"llama", "yarn", "yarn rotary scaling"},
      {"llama", "dynamic", "dynamic rotary scaling"},
      {"mistral", "mistral", "sliding window"},
      {"qwen2", "qwen2", "biases of q, k and v"},
      {"qwen2", "qwen2_window", "sliding window in some layers"},
      {"qwen3", "qwen3", "norms of q and k, biases, grouped queries"},
      {"ernie4_5", "ernie4_5", "interleaved rotary, biases everywhere"},
      {"mixtral", "mixtral", "normalised top 2, several files"},
      {"mixtral", "mixtral_fused", "fused expert tensors, sliding window"},
      {"deepseek", "deepseek", "shared experts, dense first layer"},
      {"deepseek_v2", "deepseek_v2", "MLA, group-limited routing, yarn with mscale"},
      {"deepseekv2", "deepseek_v2_greedy", "MLA with compressed queries and biases"},
      {"deepseek_v3", "deepseek_v3", "MLA, sigmoid routing in groups with correction, scaling"},
      {"kimi_k2", "kimi_k2", "MLA, sigmoid routing in one group"},
      {"qwen2_moe", "qwen2_moe", "shared expert with a gate, dense layers named"},
      {"qwen3_moe", "qwen3_moe", "norms of q and k, every second layer sparse"},
      {"qwen3_moe", "qwen3_moe_fused", "fused expert tensors, weights not normalised"},
      {"glm4_moe", "glm4_moe", "half of each head rotates, norms of q and k, correction"},
      {"ernie4_5_moe", "ernie4_5_moe", "correction, shared experts, interleaved rotary, biases"},
  };
  return all;
}

struct Layout {
  std::vector<double> weights;
  int64_t moe_ep = 1;
};

std::vector<Layout> layouts(bool experts) {
  const auto equal = [](size_t n) { return std::vector<double>(n, 1.0); };
  std::vector<Layout> all = {{equal(2)}, {equal(3)}, {equal(5)}, {{3.0, 1.0}}};
  if (experts)
    for (const int64_t ep : {2, 3})
      for (const size_t tp : {1, 2}) all.push_back({equal(static_cast<size_t>(ep) * tp), ep});
  if (experts) all.push_back({{1.0, 2.0, 1.0, 1.0}, 2});
  return all;
}

struct Generated {
  std::vector<float> logits;
  std::vector<int32_t> tokens;
};

// A prompt, then greedy tokens one by one.
Generated generate(const std::string& directory, const Reference& reference, ops::Isa isa,
             const Layout& layout) {
  Generated run;
  run.logits = run_steps(
      {.directory = directory, .isa = isa, .weights = layout.weights, .moe_ep = layout.moe_ep,
       .generate = kGreedy, .generated = &run.tokens},
      {{.slices = {{.tokens = {reference.tokens.begin(),
                               reference.tokens.begin() + static_cast<long>(kPrompt)}}}}});
  return run;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class FamilyTest : public ::testing::TestWithParam<Case> {};

TEST_P(FamilyTest, AgreesInF32) {
  const std::string& name = GetParam().name;
  const Reference reference = read_reference(name);
  const TestDirectory wide("f32-" + name);
  copy_checkpoint(oracle_directory(name), wide.path(), nlohmann::json::object(), true);
  const ops::Isa isa = ops::best_isa_of(ops::NumericClass::kFma32);
  const double worst = difference(reference, {.directory = wide.path(), .isa = isa});
  RecordProperty("worst_in_std", std::to_string(worst));
  EXPECT_LE(worst, kAllowedF32);
  const Generated run = generate(wide.path(), reference, isa, {{1.0}});
  EXPECT_EQ(run.tokens, reference.greedy);
  EXPECT_GE(std::set<int32_t>(run.tokens.begin(), run.tokens.end()).size(), 8U);
}

TEST_P(FamilyTest, AgreesInBf16OnEveryPath) {
  const std::string& name = GetParam().name;
  const Reference reference = read_reference(name);
  for (const ops::Isa isa : ops::available_isas()) {
    const double worst = difference(reference, {.directory = oracle_directory(name), .isa = isa});
    EXPECT_LE(worst, kAllowedBf16) << ops::isa_name(isa);
    RecordProperty("worst_in_std_" + std::string(ops::isa_name(isa)), std::to_string(worst));
  }
}

TEST_P(FamilyTest, AnyLayoutGivesTheSameBits) {
  const std::string& name = GetParam().name;
  const Reference reference = read_reference(name);
  const std::string directory = oracle_directory(name);
  if (kThreadSanitizer && name != "mixtral" && name != "deepseek_v3")
    GTEST_SKIP() << "two families are enough for threads";
  const bool experts = read_model_info(directory).experts.count > 0;
  const TestDirectory wide("layouts-" + name);
  copy_checkpoint(directory, wide.path(), nlohmann::json::object(), true);
  for (const auto& [from, isa] :
       {std::pair(directory, ops::default_isa()),
        std::pair(wide.path(), ops::best_isa_of(ops::NumericClass::kFma32))}) {
    const Generated alone = generate(from, reference, isa, {{1.0}});
    ASSERT_EQ(alone.tokens.size(), static_cast<size_t>(kGreedy));
    for (const Layout& layout : layouts(experts)) {
      if (kThreadSanitizer && layout.weights.size() != 3 && layout.moe_ep == 1) continue;
      const Generated run = generate(from, reference, isa, layout);
      EXPECT_EQ(run.tokens, alone.tokens) << layout.weights.size() << " ranks, ep " << layout.moe_ep;
      EXPECT_TRUE(same_bits(run.logits, alone.logits))
          << layout.weights.size() << " ranks, ep " << layout.moe_ep;
    }
    // Token by token is the same as all at once.
    std::vector<int32_t> tokens(reference.tokens.begin(),
                                reference.tokens.begin() + static_cast<long>(kPrompt));
    tokens.insert(tokens.end(), alone.tokens.begin(), alone.tokens.end() - 1);
    EXPECT_TRUE(same_bits(run_steps({.directory = from, .isa = isa, .weights = {1, 1}},
                                    {{.slices = {{.tokens = tokens}}}}),
                          alone.logits));
  }
}

INSTANTIATE_TEST_SUITE_P(All, FamilyTest, ::testing::ValuesIn(cases()),
                         [](const auto& info) { return info.param.name; });

// --- Features: without any of them the match breaks -------------------------------------------

struct Feature {
  std::string name;
  std::string what;
  std::function<void(DecoderConfig&)> change;
};

std::vector<Feature> features() {
  using C = DecoderConfig;
  using Rotary = layers::RotaryConfig::Type;
  using Score = ops::RoutingRule::Score;
  using Group = ops::RoutingRule::GroupScore;
  std::vector<Feature> all = {
      {"llama3", "scaling", [](C& c) { c.rotary.type = Rotary::kDefault; }},
      {"linear", "scaling", [](C& c) { c.rotary.type = Rotary::kDefault; }},
      {"linear", "mlp_bias", [](C& c) { c.info.mlp_bias = false; }},
      {"mistral", "window", [](C& c) { set_window(c, 0); }},
      {"yarn", "scaling", [](C& c) { c.rotary.type = Rotary::kDefault; }},
      {"yarn", "attention_factor", [](C& c) { c.rotary.attention_factor = 1.0; }},
      {"yarn", "factor", [](C& c) { c.rotary.factor = 4.0; }},
      {"yarn", "beta_slow", [](C& c) { c.rotary.beta_slow = 0.01; }},
      {"dynamic", "scaling", [](C& c) { c.rotary.type = Rotary::kDefault; }},
      {"dynamic", "factor", [](C& c) { c.rotary.factor = 2.0; }},
      {"qwen2", "qkv_bias", [](C& c) { c.info.qkv_bias = false; }},
      {"qwen2_window", "window", [](C& c) { set_window(c, 0); }},
      {"qwen2_window", "window_of_all_layers", [](C& c) { set_window(c, 5); }},
      {"qwen3", "qk_norm", [](C& c) { c.info.qk_norm = false; }},
      {"qwen3", "qkv_bias", [](C& c) { c.info.qkv_bias = false; }},
      {"qwen3", "output_bias", [](C& c) { c.info.output_bias = false; }},
      {"ernie4_5", "interleaved", [](C& c) { c.rotary.interleaved = false; }},
      {"ernie4_5", "mlp_bias", [](C& c) { c.info.mlp_bias = false; }},
      {"ernie4_5", "theta", [](C& c) { c.rotary.theta = 10000.0; }},
      {"mixtral", "normalise", [](C& c) { c.routing.normalise = false; }},
      {"mixtral", "per_token", [](C& c) { c.info.experts.per_token = 1; }},
      {"mixtral_fused", "window", [](C& c) { set_window(c, 0); }},
      {"qwen2_moe", "shared_gate", [](C& c) { c.info.experts.shared_gate = false; }},
      {"qwen2_moe", "shared_expert",
       [](C& c) {
         c.info.experts.shared_gate = false;
         c.info.experts.shared_intermediate_size = 0;
       }},
      {"qwen2_moe", "not_normalised", [](C& c) { c.routing.normalise = true; }},
      {"qwen3_moe", "normalise", [](C& c) { c.routing.normalise = false; }},
      {"qwen3_moe", "qk_norm", [](C& c) { c.info.qk_norm = false; }},
      {"deepseek", "shared_experts", [](C& c) { c.info.experts.shared_intermediate_size = 0; }},
      {"deepseek", "not_normalised", [](C& c) { c.routing.normalise = true; }},
      {"deepseek_v2", "groups", [](C& c) { c.routing.groups = c.routing.open_groups = 1; }},
      {"deepseek_v2", "open_groups", [](C& c) { c.routing.open_groups = 1; }},
      {"deepseek_v2", "group_score", [](C& c) { c.routing.group_score = Group::kBestTwo; }},
      {"deepseek_v2", "scaling", [](C& c) { c.routing.scale = 1.0F; }},
      {"deepseek_v2", "interleaved", [](C& c) { c.rotary.interleaved = false; }},
      {"deepseek_v2", "mscale", [](C& c) { c.attention_scale = 0.25; }},
      {"deepseek_v2_greedy", "latent_bias", [](C& c) { c.info.latent.bias = false; }},
      {"deepseek_v3", "sigmoid", [](C& c) { c.routing.score = Score::kSoftmax; }},
      {"deepseek_v3", "correction", [](C& c) { c.info.experts.correction_bias = false; }},
      {"deepseek_v3", "groups", [](C& c) { c.routing.groups = c.routing.open_groups = 1; }},
      {"deepseek_v3", "group_score", [](C& c) { c.routing.group_score = Group::kBest; }},
      {"deepseek_v3", "normalise", [](C& c) { c.routing.normalise = false; }},
      {"deepseek_v3", "scaling", [](C& c) { c.routing.scale = 1.0F; }},
      {"deepseek_v3", "yarn", [](C& c) { c.rotary.type = Rotary::kDefault; }},
      {"kimi_k2", "correction", [](C& c) { c.info.experts.correction_bias = false; }},
      {"glm4_moe", "partial_rotary", [](C& c) { c.rotary.rotary_dim = c.info.head_dim; }},
      {"glm4_moe", "qk_norm", [](C& c) { c.info.qk_norm = false; }},
      {"glm4_moe", "correction", [](C& c) { c.info.experts.correction_bias = false; }},
      {"glm4_moe", "qkv_bias", [](C& c) { c.info.qkv_bias = false; }},
      {"glm4_moe", "shared_expert", [](C& c) { c.info.experts.shared_intermediate_size = 0; }},
      {"ernie4_5_moe", "correction", [](C& c) { c.info.experts.correction_bias = false; }},
      {"ernie4_5_moe", "softmax", [](C& c) { c.routing.score = Score::kSigmoid; }},
      {"ernie4_5_moe", "normalise", [](C& c) { c.routing.normalise = false; }},
      {"ernie4_5_moe", "bias", [](C& c) { c.info.mlp_bias = false; }},
      {"ernie4_5_moe", "head_bias", [](C& c) { c.info.head_bias = false; }},
      {"ernie4_5_moe", "interleaved", [](C& c) { c.rotary.interleaved = false; }},
  };
  return all;
}

class FamilyFeature : public ::testing::TestWithParam<Feature> {};

TEST_P(FamilyFeature, MattersToTheLogits) {
  const Feature& feature = GetParam();
  if (kThreadSanitizer) GTEST_SKIP() << "one thread";
  const TestDirectory wide("feature-" + feature.name + "-" + feature.what);
  copy_checkpoint(oracle_directory(feature.name), wide.path(), nlohmann::json::object(), true);
  const double worst = difference(read_reference(feature.name),
                                  {.directory = wide.path(), .change = feature.change});
  EXPECT_GT(worst, 20 * kAllowedF32);
}

INSTANTIATE_TEST_SUITE_P(All, FamilyFeature, ::testing::ValuesIn(features()), [](const auto& info) {
  return info.param.name + "_" + info.param.what;
});

TEST(FamilyLayers, DenseOnesMustBeWhereTheyAre) {
  for (const std::string name : {"deepseek_v3", "glm4_moe", "ernie4_5_moe", "qwen2_moe"}) {
    const auto sparse = [](DecoderConfig& c) { c.info.experts.in_layer[0] = true; };
    EXPECT_THROW(
        (void)run_steps({.directory = oracle_directory(name), .change = sparse},
                        {{.slices = {{.tokens = {1, 2, 3}}}}}),
        Error)
        << name;
  }
}

// --- The table -----------------------------------------------------------------------------------

// Families of the guides that are refused by name.
constexpr std::string_view kNotSupported[] = {"deepseek_v32", "chatglm",   "baichuan", "bloom",
                                              "internlm2",    "internlm3", "phi3",     "telechat",
                                              "minicpm",      "hunyuan"};

std::string layouts_text(bool experts) {
  std::vector<std::string> ranks;
  std::vector<std::string> parallel;
  for (const Layout& layout : layouts(experts)) {
    const bool equal = std::adjacent_find(layout.weights.begin(), layout.weights.end(),
                                          std::not_equal_to<>()) == layout.weights.end();
    if (layout.moe_ep == 1 && equal) ranks.push_back(std::to_string(layout.weights.size()));
    if (layout.moe_ep > 1 && equal)
      parallel.push_back(fmt::format("{}×{}", layout.moe_ep,
                                     static_cast<int64_t>(layout.weights.size()) / layout.moe_ep));
  }
  return fmt::format("| 1, {} | {} |", fmt::join(ranks, ", "),
                     parallel.empty() ? "–" : fmt::format("{}", fmt::join(parallel, ", ")));
}

// What the tests above measure, once more: the largest differences, for every case.
std::string table_text() {
  std::string text =
      "| family | checkpoint | shows | f32, bf16: largest difference (standard deviations) | ranks "
      "with equal bits | moe_ep × moe_tp |\n|---|---|---|---|---|---|\n";
  for (const Case& c : cases()) {
    const Reference reference = read_reference(c.name);
    const TestDirectory wide("table-" + c.name);
    copy_checkpoint(oracle_directory(c.name), wide.path(), nlohmann::json::object(), true);
    const double f32 = difference(
        reference,
        {.directory = wide.path(), .isa = ops::best_isa_of(ops::NumericClass::kFma32)});
    const double bf16 = difference(reference, {.directory = oracle_directory(c.name)});
    EXPECT_LE(f32, kAllowedF32) << c.name;
    EXPECT_LE(bf16, kAllowedBf16) << c.name;
    text += fmt::format("| `{}` | {} | {} | {:.0e}, {:.1f} % {}\n", c.model_type, c.name, c.shows,
                        f32, 100 * bf16,
                        layouts_text(read_model_info(oracle_directory(c.name)).experts.count > 0));
  }
  for (const std::string_view name : kNotSupported)
    text += fmt::format("| `{}` | – | not supported, refused by name | – | – | – |\n", name);
  // Refused by the configuration (apps/config_test.cc).
  text += "| MTP layers as speculation (`plugin_type` `mtp`) | – | not supported, refused by name | – | – | – |\n";
  return text;
}

TEST(FamilyTable, IsThatOfTheDocumentation) { hold_table("table", table_text()); }

TEST(FamilyTable, OthersAreRefusedByName) {
  for (const std::string_view name : kNotSupported) {
    const TestDirectory directory("refused");
    copy_checkpoint(oracle_directory("qwen2"), directory.path(), {{"model_type", name}}, false);
    try {
      (void)read_model_info(directory.path());
      FAIL() << name;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(fmt::format("unknown model family, found {}", name)),
                std::string::npos)
          << e.what();
    }
  }
}

}  // namespace
}  // namespace phalanx::models
