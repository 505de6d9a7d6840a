#include "apps/run_report.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "phalanx/base/error.h"

namespace phalanx::apps {

void report_benchmark(const std::vector<PromptResult>& results,
                      const std::vector<int64_t>& prompt_lengths, const std::string& csv_path) {
  int64_t begin = INT64_MAX;
  int64_t end = 0;
  int64_t input = 0;
  int64_t output = 0;
  int64_t batch = 0;
  std::vector<double> prefill;
  std::vector<double> decode;
  for (size_t i = 0; i < results.size(); ++i) {
    const PromptResult& r = results[i];
    if (r.token_ns.empty()) continue;
    ++batch;
    begin = std::min(begin, r.submitted_ns);
    end = std::max(end, r.token_ns.back());
    input = std::max(input, prompt_lengths[i]);
    output = std::max(output, static_cast<int64_t>(r.tokens.size()));
    prefill.push_back(static_cast<double>(r.token_ns.front() - r.submitted_ns) / 1e6);
    for (size_t t = 1; t < r.token_ns.size(); ++t)
      decode.push_back(static_cast<double>(r.token_ns[t] - r.token_ns[t - 1]) / 1e6);
  }
  if (batch == 0) return;
  const auto mean = [](const std::vector<double>& v) {
    double sum = 0;
    for (const double x : v) sum += x;
    return v.empty() ? 0.0 : sum / static_cast<double>(v.size());
  };
  const double e2e = static_cast<double>(end - begin) / 1e6;
  const double first = *std::max_element(prefill.begin(), prefill.end());
  fmt::print("Prefill time: {:.2f}ms, Prefill average time: {:.2f}ms, Decode token time: {:.2f}ms, E2E time: {:.2f}ms\n",
             first, mean(prefill), mean(decode), e2e);
  fmt::print("-------------------performance dumped------------------------\n");
  static constexpr char kColumns[] =
      "batch_size,input_seq_len,output_seq_len,e2e_time(ms),prefill_time(ms),decoder_token_time(ms),"
      "prefill_count,prefill_token_times,decode_token_times,prefill_average_time(ms)";
  const auto join = [](const std::vector<double>& v) {
    std::string text;
    for (const double x : v) text += fmt::format("{}{:.2f}", text.empty() ? "" : ";", x);
    return text;
  };
  const std::vector<std::string> row = {
      std::to_string(batch), std::to_string(input), std::to_string(output), fmt::format("{:.2f}", e2e),
      fmt::format("{:.2f}", first), fmt::format("{:.2f}", mean(decode)), std::to_string(prefill.size()),
      join(prefill), join(decode), fmt::format("{:.2f}", mean(prefill))};
  std::string header = kColumns;
  std::string rule;
  for (size_t at = 0; (at = header.find(',', at)) != std::string::npos; at += 3) header.replace(at, 1, " | ");
  for (size_t i = 0; i < row.size(); ++i) rule += "| --- ";
  fmt::print("| {} |\n{}|\n| {} |\n", header, rule, fmt::join(row, " | "));

  const std::filesystem::path path(csv_path);
  std::error_code failed;
  if (path.has_parent_path() && !std::filesystem::exists(path.parent_path())) {
    std::filesystem::create_directories(path.parent_path(), failed);
    ::chmod(path.parent_path().c_str(), 0750);
  }
  std::ofstream file(path);
  file << kColumns << '\n' << fmt::format("{}", fmt::join(row, ",")) << '\n';
  file.close();
  if (!file)
    throw Error(Code::kPermissionDenied, fmt::format("cannot write {}. Fix: set ATB_LLM_BENCHMARK_FILEPATH to a path you may write", csv_path));
  ::chmod(path.c_str(), 0640);
}

}  // namespace phalanx::apps
