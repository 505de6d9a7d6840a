// An int8 KV cache: against the formula, and the same tokens for any number of ranks, any pieces of the
// prompt and any blocks.

#include <cstring>
#include <set>

#include "phalanx/base/sanitizer.h"
#include "phalanx/models/kv_format.h"
#include "phalanx/models/test_oracle.h"

namespace phalanx::models {
namespace {

constexpr int64_t kPrompt = 1500;
constexpr int64_t kSequence = 1552;
constexpr int64_t kGenerated = 32;
const std::string kQuantised = std::string(PHALANX_ORACLE_DIR) + "/../quantised/";

std::vector<int32_t> prompt_of(int64_t count, uint32_t state) {
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525U + 1013904223U;
    tokens.push_back(static_cast<int32_t>((state >> 8) % 170U));
  }
  return tokens;
}

struct Continued {
  std::vector<float> logits;  // of the prompt's last token and of the generated ones
  std::vector<int32_t> tokens;
};

// The prompt in pieces of `piece` tokens, then greedy tokens one by one.
Continued run(const std::string& directory, KvDtype kv, uint32_t seed, size_t ranks, int64_t piece,
              int64_t moe_ep = 1) {
  const auto tokens = prompt_of(kPrompt, seed);
  std::vector<TestStep> steps;
  for (int64_t begin = 0; begin < kPrompt; begin += piece)
    steps.push_back({.slices = {{.begin = begin,
                                 .tokens = {tokens.begin() + begin,
                                            tokens.begin() + std::min(kPrompt, begin + piece)}}},
                     .sample_all = false});
  Continued result;
  const auto all = run_steps({.directory = directory,
                              .isa = ops::default_isa(),
                              .weights = std::vector<double>(ranks, 1.0),
                              .threads = ranks == 1 ? 2 : 1,
                              .max_tokens = std::min(kPrompt, piece),
                              .max_sequence = kSequence,
                              .moe_ep = moe_ep,
                              .kv = kv,
                              .generate = kGenerated,
                              .generated = &result.tokens},
                             steps);
  result.logits.assign(all.end() - kGenerated * 170, all.end());
  return result;
}

struct Case {
  std::string name;
  std::string directory;
  KvDtype kv = KvDtype::kInt8;
};

class KvInt8 : public ::testing::TestWithParam<Case> {};

TEST_P(KvInt8, ALongPromptContinuesAlikeOnAnyNumberOfRanks) {
  const Case& c = GetParam();
  if (kThreadSanitizer) GTEST_SKIP() << "long; ranks and threads meet in shorter tests";
  // A prompt after which the model does not repeat itself soon, if there is one; the bits of all logits
  // are compared in any case.
  uint32_t seed = 777;
  Continued alone;
  const auto distinct = [&] {
    return std::set<int32_t>(alone.tokens.begin(), alone.tokens.end()).size();
  };
  while (seed < 797 && distinct() < 8) alone = run(c.directory, c.kv, ++seed, 1, kPrompt);
  ASSERT_EQ(alone.tokens.size(), static_cast<size_t>(kGenerated));
  const auto expect_same = [&](const Continued& other, const std::string& how) {
    EXPECT_EQ(other.tokens, alone.tokens) << how;
    EXPECT_EQ(std::memcmp(other.logits.data(), alone.logits.data(),
                          alone.logits.size() * sizeof(float)),
              0)
        << how;
  };
  for (const size_t ranks : {2U, 3U, 5U})
    expect_same(run(c.directory, c.kv, seed, ranks, kPrompt), std::to_string(ranks) + " ranks");
  // In pieces, as the scheduler cuts prompts and as lost sequences are computed again.
  expect_same(run(c.directory, c.kv, seed, 2, 412), "in pieces of 412");
  expect_same(run(c.directory, c.kv, seed, 1, 97), "in pieces of 97");
  if (read_model_info(c.directory).experts.count > 0)
    expect_same(run(c.directory, c.kv, seed, 4, kPrompt, 2), "moe_ep 2");
  // It is another cache than that of the activations' type.
  const Continued wide = run(c.directory, KvDtype::kBf16, seed, 1, kPrompt);
  EXPECT_NE(std::memcmp(wide.logits.data(), alone.logits.data(),
                        alone.logits.size() * sizeof(float)),
            0);
}

INSTANTIATE_TEST_SUITE_P(
    All, KvInt8,
    ::testing::Values(Case{"by_option", std::string(PHALANX_ORACLE_DIR) + "/llama3_bf16"},
                      Case{"by_option_f32", kQuantised + "llama_kv_int8"},
                      Case{"by_checkpoint", kQuantised + "llama_ms_c8", KvDtype::kCheckpoint},
                      Case{"of_latent_rows", std::string(PHALANX_ORACLE_DIR) + "/deepseek_v3"}),
    [](const auto& info) { return info.param.name; });

// Blocks that another sequence has filled serve as they are: the prefix cache.
TEST(KvInt8Blocks, OfAnotherSequenceGiveTheSameBits) {
  const auto tokens = prompt_of(60, 777);
  const std::vector<int32_t> prefix(tokens.begin(), tokens.begin() + 32);
  const std::vector<int32_t> rest(tokens.begin() + 32, tokens.end());
  const RunOptions options{.directory = std::string(PHALANX_ORACLE_DIR) + "/tied_bf16",
                           .isa = ops::default_isa(),
                           .kv = KvDtype::kInt8};
  const auto whole = run_steps(options, {{.slices = {{.tokens = tokens}}}});
  // The blocks of sequence 0 hold the prefix of a longer run; then the rest is computed anew.
  const auto shared = run_steps(options, {{.slices = {{.tokens = tokens}}, .sample_all = false},
                                          {.slices = {{.begin = 32, .tokens = rest}}}});
  ASSERT_EQ(shared.size(), (1 + rest.size()) * 170);
  EXPECT_EQ(std::memcmp(shared.data() + 170, whole.data() + 32 * 170,
                        rest.size() * 170 * sizeof(float)),
            0);
}

TEST(KvInt8Memory, IsCountedAndReported) {
  const std::string directory = std::string(PHALANX_ORACLE_DIR) + "/tied_bf16";
  const ModelInfo info = read_model_info(directory);
  const auto bytes = [&](KvDtype kv) {
    return memory_need(info, {.directory = directory, .max_step_tokens = 8, .max_step_rows = 8,
                              .max_sequence = 64, .block_size = kTestBlock, .kv = kv,
                              .weights = {1.0}})
        .kv_bytes_per_block;
  };
  const int64_t values =
      2 * info.num_layers * info.num_key_value_heads * info.head_dim * kTestBlock;
  EXPECT_EQ(bytes(KvDtype::kBf16), 2 * values);
  EXPECT_EQ(bytes(KvDtype::kInt8), values + values / info.head_dim * 4);
  EXPECT_EQ(kv_format_text(info, KvDtype::kCheckpoint), "bf16");
  EXPECT_EQ(kv_format_text(info, KvDtype::kInt8), "int8 (a scale per token and head)");
  const ModelInfo stored = read_model_info(kQuantised + "llama_ms_c8");
  EXPECT_EQ(kv_format_text(stored, KvDtype::kCheckpoint),
            "int8 (C8: the checkpoint's scales per channel)");
  EXPECT_EQ(kv_format_text(stored, KvDtype::kBf16),
            "bf16 (the checkpoint's scales for int8 are not used)");
  EXPECT_EQ(kv_dtype_of("bfloat16"), KvDtype::kBf16);
  EXPECT_EQ(kv_dtype_of("fp8"), std::nullopt);
}

}  // namespace
}  // namespace phalanx::models
