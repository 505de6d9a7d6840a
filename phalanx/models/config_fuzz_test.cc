// Damaged config.json of every family: read or refused, and what is read can be planned.
// PHALANX_FUZZ_SECONDS; `make fuzz`.

#include <iostream>

#include "phalanx/base/fuzz.h"
#include "phalanx/models/test_oracle.h"

namespace phalanx::models {
namespace {

TEST(ConfigFuzz, ReadOrRefused) {
  std::vector<std::string> seeds;
  for (const auto& entry : std::filesystem::directory_iterator(PHALANX_ORACLE_DIR))
    if (entry.is_directory())
      seeds.push_back(read_text_file(entry.path().string() + "/config.json", 1 << 20));
  const TestDirectory directory("config-fuzz");
  int64_t planned = 0;
  const int64_t tried = fuzz(seeds, [&](const std::string& bytes, int64_t number) {
    SCOPED_TRACE(number);
    std::ofstream(directory.path() + "/config.json") << bytes;
    try {
      const ModelInfo info = read_model_info(directory.path());
      const std::vector<double> weights = {1.0, 2.0};
      (void)memory_need(info, {.directory = directory.path(), .max_step_tokens = 16,
                               .max_step_rows = 4, .max_sequence = 64, .weights = weights});
      ++planned;
    } catch (const Error&) {
    }
  });
  std::cout << tried << " files, " << planned << " planned\n";
  EXPECT_GT(tried, 10);
}

}  // namespace
}  // namespace phalanx::models
