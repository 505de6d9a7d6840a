// The demo model, where it is at hand (PHALANX_DEMO_MODEL names its directory), against transformers
// in fp32 on the same checkpoint.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "phalanx/base/json.h"
#include "phalanx/models/test_ranks.h"

namespace phalanx::models {
namespace {

TEST(DemoModel, AgreesWithTransformers) {
  const char* directory = std::getenv("PHALANX_DEMO_MODEL");
  if (directory == nullptr) GTEST_SKIP() << "PHALANX_DEMO_MODEL is not set";
  const ModelInfo info = read_model_info(directory);
  // 30 layers of bf16 rounding at every named edge; in f32 only the order of sums differs.
  const double allowed = info.act == tensor::DType::kBF16 ? 0.15 : 1e-4;
  const auto reference = read_json_file(std::string(PHALANX_ORACLE_DIR) + "/smollm2.json");
  const auto sample = reference["sample"].get<std::vector<size_t>>();
  const auto vocab = static_cast<size_t>(info.vocab_size);
  double worst_of_all = 0;
  for (const auto& prompt : reference["prompts"]) {
    const double std = prompt["std"].get<double>();
    const auto logits = run_steps(
        {.directory = directory, .isa = ops::choose_isa()},
        {{.slices = {{.sequence = 0, .tokens = prompt["tokens"].get<std::vector<int32_t>>()}}}});
    ASSERT_EQ(logits.size(), prompt["positions"].size() * vocab);
    double worst = 0;
    for (size_t t = 0; t < prompt["positions"].size(); ++t) {
      const auto& position = prompt["positions"][t];
      const float* row = logits.data() + t * vocab;
      const auto compare = [&](size_t id, double expected) {
        worst = std::max(worst, std::abs(static_cast<double>(row[id]) - expected) / std);
      };
      const auto top = position["top"].get<std::vector<size_t>>();
      const auto top_logits = position["top_logits"].get<std::vector<double>>();
      for (size_t i = 0; i < top.size(); ++i) compare(top[i], top_logits[i]);
      for (size_t i = 0; i < sample.size(); ++i)
        compare(sample[i], position["sample_logits"][i].get<double>());
      // Where the first candidate leads by more than rounding can move it, it must be first.
      const auto best = static_cast<size_t>(std::max_element(row, row + vocab) - row);
      if (top_logits[0] - top_logits[1] > 2 * allowed * std) {
        EXPECT_EQ(best, top[0]) << prompt["text"] << " position " << t;
      }
      double sum = 0;
      for (size_t i = 0; i < vocab; ++i) sum += std::exp(static_cast<double>(row[i] - row[best]));
      EXPECT_NEAR(std::log(sum) + row[best], position["lse"].get<double>(), allowed * std);
    }
    EXPECT_LE(worst, allowed) << prompt["text"];
    worst_of_all = std::max(worst_of_all, worst);
  }
  RecordProperty("worst_in_std", std::to_string(worst_of_all));
}

}  // namespace
}  // namespace phalanx::models
