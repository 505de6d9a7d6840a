#include "phalanx/base/log.h"

#include <pwd.h>
#include <spdlog/logger.h>
#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <unistd.h>

#include <memory>
#include <vector>

#include "phalanx/base/log_file.h"

namespace phalanx {
namespace {

spdlog::level::level_enum to_spdlog(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug: return spdlog::level::debug;
    case LogLevel::kInfo: return spdlog::level::info;
    case LogLevel::kWarn: return spdlog::level::warn;
    case LogLevel::kError: return spdlog::level::err;
  }
  return spdlog::level::info;
}

void append_json_text(std::string_view text, spdlog::memory_buf_t& out) {
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out.push_back('\\');
      out.push_back(c);
    } else if (byte < 0x20) {
      fmt::format_to(std::back_inserter(out), "\\u{:04x}", byte);
    } else {
      out.push_back(c);
    }
  }
}

// "%*" in a pattern: the message as the inside of a JSON string.
class JsonText final : public spdlog::custom_flag_formatter {
 public:
  void format(const spdlog::details::log_msg& message, const std::tm&,
              spdlog::memory_buf_t& out) override {
    append_json_text({message.payload.data(), message.payload.size()}, out);
  }
  [[nodiscard]] std::unique_ptr<custom_flag_formatter> clone() const override {
    return std::make_unique<JsonText>();
  }
};

std::unique_ptr<spdlog::formatter> make_formatter(const LogOptions& options) {
  auto formatter = std::make_unique<spdlog::pattern_formatter>();
  if (options.json) {
    formatter->add_flag<JsonText>('*');
    spdlog::memory_buf_t tag;
    append_json_text(options.tag, tag);
    formatter->set_pattern("{\"time\":\"%Y-%m-%dT%H:%M:%S.%f%z\",\"level\":\"%l\",\"pid\":%P,\"who\":\"" +
                           std::string(tag.data(), tag.size()) + "\",\"message\":\"%*\"}");
  } else if (!options.verbose) {
    formatter->set_pattern("[%Y-%m-%d %H:%M:%S.%f] : [%l] %v");
  } else {
    const std::string tag = options.tag.empty() ? "" : " [" + options.tag + "]";
    formatter->set_pattern("[%Y-%m-%d %H:%M:%S.%f] [%P] [%l]" + tag + " %v");
  }
  return formatter;
}

std::shared_ptr<spdlog::logger> make_logger(const LogOptions& options) {
  std::vector<spdlog::sink_ptr> sinks;
  if (options.to_stderr) sinks.push_back(std::make_shared<spdlog::sinks::stderr_sink_mt>());
  if (!options.file.empty())
    sinks.push_back(std::make_shared<LogFileSink>(
        LogFile(options.file, int64_t{options.file_mb} << 20, options.file_count)));
  auto logger = std::make_shared<spdlog::logger>("phalanx", sinks.begin(), sinks.end());
  logger->set_level(to_spdlog(options.level));
  logger->set_formatter(make_formatter(options));
  logger->flush_on(spdlog::level::info);
  return logger;
}

std::string user_name() {
  passwd entry{};
  passwd* found = nullptr;
  char buffer[4096];
  if (::getpwuid_r(::getuid(), &entry, buffer, sizeof buffer, &found) == 0 && found != nullptr)
    return found->pw_name;
  return fmt::format("uid {}", ::getuid());
}

std::shared_ptr<spdlog::logger> make_audit_logger(const LogOptions& options) {
  if (options.audit_file.empty()) return nullptr;
  auto logger = std::make_shared<spdlog::logger>(
      "audit", std::make_shared<LogFileSink>(LogFile(
                   options.audit_file, int64_t{options.file_mb} << 20, options.file_count)));
  logger->set_pattern("[%Y-%m-%d %H:%M:%S.%f] [%P] [" + user_name() + "] %v");
  logger->flush_on(spdlog::level::info);
  return logger;
}

std::shared_ptr<spdlog::logger>& logger() {
  static std::shared_ptr<spdlog::logger> instance = make_logger({});
  return instance;
}

std::shared_ptr<spdlog::logger>& audit_logger() {
  static std::shared_ptr<spdlog::logger> instance;
  return instance;
}

}  // namespace

void set_up_log(const LogOptions& options) {
  logger() = make_logger(options);
  audit_logger() = make_audit_logger(options);
}

bool log_enabled(LogLevel level) { return logger()->should_log(to_spdlog(level)); }

void set_log_level(LogLevel level) { logger()->set_level(to_spdlog(level)); }

void log_line(LogLevel level, std::string_view line) {
  logger()->log(to_spdlog(level), spdlog::string_view_t(line.data(), line.size()));
}

void log_audit(std::string_view caller, std::string_view operation, std::string_view result) {
  if (const auto& audit = audit_logger())
    audit->info("[{}] [server] [{}] [{}]", caller, operation, result);
}

}  // namespace phalanx
