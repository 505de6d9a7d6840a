#include "phalanx/engine/logits_log.h"

#include <fmt/format.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <system_error>

#include "phalanx/base/error.h"

namespace phalanx::engine {

LogitsLog::LogitsLog(std::string folder, int64_t vocab_size)
    : folder_(std::move(folder)), vocab_size_(vocab_size) {
  std::error_code error;
  std::filesystem::create_directories(folder_, error);
  if (error) {
    throw Error(Code::kInvalidArgument,
                fmt::format("logits folder '{}' cannot be made: {}", folder_, error.message()));
  }
}

void LogitsLog::append(const StepPlanView& plan, const float* logits) {
  const auto sequences = plan.sequences();
  size_t s = 0;
  for (const int32_t row : plan.inputs().sample_rows) {
    while (row >= sequences[s].token_begin + sequences[s].token_count) ++s;
    const std::string path = fmt::format("{}/seq{}.f32", folder_, sequences[s].tag);
    const bool first = begun_.insert(sequences[s].tag).second;
    struct Close {
      void operator()(std::FILE* file) const { std::fclose(file); }
    };
    const std::unique_ptr<std::FILE, Close> file(std::fopen(path.c_str(), first ? "wbe" : "abe"));
    const auto count = static_cast<size_t>(vocab_size_);
    if (file == nullptr || std::fwrite(logits, sizeof(float), count, file.get()) != count ||
        std::fflush(file.get()) != 0) {
      throw Error(Code::kResourceExhausted,
                  fmt::format("logits file '{}' cannot be written: {}", path,
                              std::strerror(errno)));
    }
    logits += vocab_size_;
  }
}

}  // namespace phalanx::engine
