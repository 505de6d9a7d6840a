#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "apps/prompt_head.h"

namespace phalanx::apps {

// The timing table of run_pa (ATB_LLM_BENCHMARK_ENABLE=1): one line and a Markdown table on stdout,
// and a CSV file (directory 0750, file 0640).
void report_benchmark(const std::vector<PromptResult>& results,
                      const std::vector<int64_t>& prompt_lengths, const std::string& csv_path);

}  // namespace phalanx::apps
