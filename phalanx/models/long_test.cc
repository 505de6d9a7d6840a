// 32,768 tokens on a tiny yarn checkpoint, where PHALANX_LONG_TEST is set (`make test-long`).

#include <cstdlib>
#include <iostream>

#include "phalanx/models/test_oracle.h"

namespace phalanx::models {
namespace {

constexpr int64_t kTokens = 32768;
constexpr int64_t kStep = 2048;

TEST(LongPrompt, AgreesWithTransformersOnOneTwoAndThreeRanks) {
  if (std::getenv("PHALANX_LONG_TEST") == nullptr)
    GTEST_SKIP() << "PHALANX_LONG_TEST is not set (make test-long sets it)";
  const Reference reference = read_reference("long_yarn");
  std::vector<TestStep> steps;
  uint32_t state = 12345;
  for (int64_t begin = 0; begin < kTokens; begin += kStep) {
    TestSlice slice{.begin = begin};
    for (int64_t i = 0; i < kStep; ++i) {
      state = state * 1664525U + 1013904223U;
      slice.tokens.push_back(static_cast<int32_t>((state >> 8) % 170U));
    }
    steps.push_back({.slices = {slice}, .sample_all = false});
  }
  const TestDirectory wide("long");
  copy_checkpoint(oracle_directory("long_yarn"), wide.path(), nlohmann::json::object(), true);
  for (const bool f32 : {true, false}) {
    const std::string directory = f32 ? wide.path() : oracle_directory("long_yarn");
    std::vector<float> alone;
    for (const size_t ranks : {1U, 2U, 3U}) {
      const std::vector<double> weights(ranks, 1.0);
      const ModelInfo info = read_model_info(directory);
      std::string kv;
      for (int rank = 0; rank < static_cast<int>(ranks); ++rank)
        kv += " " + std::to_string(
                        kTokens / kTestBlock *
                        memory_need(info, {.directory = directory, .max_step_tokens = kStep,
                                           .max_step_rows = 1, .max_sequence = kTokens,
                                           .block_size = kTestBlock, .weights = weights,
                                           .rank = rank})
                            .kv_bytes_per_block);
      std::cout << (f32 ? "f32, " : "bf16, ") << ranks << " ranks, KV bytes of the prompt per rank:"
                << kv << "\n";
      const auto all = run_steps({.directory = directory,
                                  .isa = f32 ? ops::best_isa_of(ops::NumericClass::kFma32)
                                             : ops::default_isa(),
                                  .weights = weights,
                                  .max_tokens = kStep,
                                  .max_sequence = kTokens},
                                 steps);
      const std::vector<float> last(all.end() - 170, all.end());
      if (ranks == 1) {
        alone = last;
        const double worst = difference(reference, last);
        std::cout << "largest difference: " << 100 * worst << " % of the standard deviation\n";
        EXPECT_LE(worst, f32 ? 1e-4 : 0.04);
      }
      EXPECT_EQ(std::memcmp(alone.data(), last.data(), 170 * sizeof(float)), 0) << ranks;
    }
  }
}

}  // namespace
}  // namespace phalanx::models
