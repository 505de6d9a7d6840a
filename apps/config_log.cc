#include "apps/config_log.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <ctime>
#include <filesystem>
#include <optional>
#include <sstream>

#include "apps/config_environment.h"

namespace phalanx::apps {
namespace {

namespace fs = std::filesystem;

constexpr int kLargestFileMb = 500;
constexpr int kMostFiles = 64;

// The variable, or the first of its removed names that is set.
std::string log_variable(const Environment& environment, const std::string& name,
                         std::initializer_list<const char*> old_names) {
  std::string value = variable(environment, name);
  for (const char* old_name : old_names)
    if (value.empty()) value = variable(environment, old_name);
  return value;
}

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return text;
}

void bad(std::vector<std::string>& warnings, const char* name, const std::string& value,
         const char* expected) {
  warnings.push_back(fmt::format("environment variable {}: found \"{}\", expected {}; not used",
                                 name, value, expected));
}

// "llm:debug;server:warn" gives the values of all components; a plain value gives itself.
std::vector<std::string> component_values(const std::string& text) {
  std::vector<std::string> values;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ';');) {
    const size_t colon = part.find(':');
    values.push_back(lower(colon == std::string::npos ? part : part.substr(colon + 1)));
  }
  return values;
}

std::optional<LogLevel> parse_level(const std::string& text) {
  if (text == "debug") return LogLevel::kDebug;
  if (text == "info") return LogLevel::kInfo;
  if (text == "warn" || text == "warning") return LogLevel::kWarn;
  if (text == "error" || text == "critical") return LogLevel::kError;
  return {};
}

// The most talkative of the components: there is one log here.
void read_level(const std::string& text, LogOptions& options, std::vector<std::string>& warnings) {
  std::optional<LogLevel> level;
  for (const std::string& value : component_values(text)) {
    const std::optional<LogLevel> one = parse_level(value);
    if (!one) {
      bad(warnings, "MINDIE_LOG_LEVEL", text, "debug, info, warn, error or critical");
      return;
    }
    level = level ? std::min(*level, *one) : *one;
  }
  if (level) options.level = *level;
}

bool read_switch(const char* name, const std::string& text, bool fallback,
                 std::vector<std::string>& warnings) {
  if (text.empty()) return fallback;
  bool on = false;
  for (const std::string& value : component_values(text)) {
    if (value == "1" || value == "true") {
      on = true;
    } else if (value != "0" && value != "false") {
      bad(warnings, name, text, "0, 1, true or false");
      return fallback;
    }
  }
  return on;
}

void read_rotation(const std::string& text, LogOptions& options,
                   std::vector<std::string>& warnings) {
  std::istringstream words(text);
  int size = options.file_mb;
  int count = options.file_count;
  bool good = true;
  for (std::string word; good && words >> word;) {
    int number = 0;
    good = static_cast<bool>(words >> number) && number >= 1;
    if (word == "-fs" && number <= kLargestFileMb)
      size = number;
    else if (word == "-r" && number <= kMostFiles)
      count = number;
    else
      good = false;
  }
  if (!good) {
    bad(warnings, "MINDIE_LOG_ROTATE", text, "\"-fs <MB, 1 to 500> -r <files, 1 to 64>\"");
    return;
  }
  options.file_mb = size;
  options.file_count = count;
}

std::optional<int64_t> parse_time(const std::string& text) {
  std::tm time{};
  if (text.size() != 19) return {};
  const char* end = ::strptime(text.c_str(), "%Y-%m-%d %H:%M:%S", &time);
  if (end == nullptr || *end != 0) return {};
  time.tm_isdst = -1;
  return static_cast<int64_t>(std::mktime(&time));
}

fs::path log_directory(const Environment& environment, const std::string& path) {
  if (!path.empty() && path.front() == '/') return fs::path(path) / "debug";
  const fs::path base = fs::path(variable(environment, "HOME")) / "mindie" / "log";
  return path.empty() ? base / "debug" : base / path / "debug";
}

}  // namespace

LogOptions node_log_options(const Environment& environment, std::vector<std::string>& warnings) {
  LogOptions options;
  read_level(log_variable(environment, "MINDIE_LOG_LEVEL",
                          {"OCK_LOG_LEVEL", "MINDIE_LLM_PYTHON_LOG_LEVEL", "MINDIE_LLM_LOG_LEVEL",
                           "MIES_PYTHON_LOG_LEVEL"}),
             options, warnings);
  options.to_stderr =
      read_switch("MINDIE_LOG_TO_STDOUT",
                  log_variable(environment, "MINDIE_LOG_TO_STDOUT",
                               {"OCK_LOG_TO_STDOUT", "MINDIE_LLM_PYTHON_LOG_TO_STDOUT",
                                "MINDIE_LLM_LOG_TO_STDOUT", "MIES_PYTHON_LOG_TO_STDOUT"}),
                  true, warnings);
  const bool to_file = read_switch(
      "MINDIE_LOG_TO_FILE",
      log_variable(
          environment, "MINDIE_LOG_TO_FILE",
          {"MINDIE_LLM_PYTHON_LOG_TO_FILE", "MINDIE_LLM_LOG_TO_FILE", "MIES_PYTHON_LOG_TO_FILE"}),
      false, warnings);
  options.verbose = read_switch("MINDIE_LOG_VERBOSE", variable(environment, "MINDIE_LOG_VERBOSE"), true,
                                warnings);
  if (const std::string format = lower(variable(environment, "PHALANX_LOG_FORMAT")); !format.empty()) {
    options.json = format == "json";
    if (format != "json" && format != "text")
      bad(warnings, "PHALANX_LOG_FORMAT", format, "json or text");
  }
  const std::string rotation = variable(environment, "MINDIE_LOG_ROTATE");
  if (!rotation.empty()) read_rotation(rotation, options, warnings);
  if (!to_file) return options;

  const fs::path folder = log_directory(
      environment, log_variable(environment, "MINDIE_LOG_PATH",
                                {"MIES_PYTHON_LOG_PATH", "MINDIE_LLM_PYTHON_LOG_PATH"}));
  const fs::path audit_folder = folder.parent_path() / "security";
  for (const fs::path& made : {folder, audit_folder}) {
    std::error_code error;
    if (!fs::exists(made, error)) {
      fs::create_directories(made, error);
      if (!error) ::chmod(made.c_str(), 0750);
    }
    if (!fs::is_directory(made, error)) {
      bad(warnings, "MINDIE_LOG_PATH", made.string(), "a directory that can be made");
      return options;
    }
  }
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  ::localtime_r(&now, &local);
  const std::string name = fmt::format("mindie-server_{}_{:%Y%m%d%H%M%S}.log", ::getpid(), local);
  options.file = (folder / name).string();
  options.audit_file = (audit_folder / name).string();
  return options;
}

std::string LogLevelKeys::problem() const {
  std::string text;
  if (!level.empty() && !parse_level(lower(level)))
    text += fmt::format("LogConfig.dynamicLogLevel: found \"{}\", expected DEBUG, INFO, WARN, ERROR or "
                        "CRITICAL. ",
                        level);
  if (valid_hours < 1 || valid_hours > 168)
    text += fmt::format("LogConfig.dynamicLogLevelValidHours: found {}, expected [1, 168]. ", valid_hours);
  if (!valid_time.empty() && !parse_time(valid_time))
    text += fmt::format("LogConfig.dynamicLogLevelValidTime: found \"{}\", expected \"YYYY-MM-DD "
                        "HH:MM:SS\". ",
                        valid_time);
  return text;
}

LogLevel LogLevelState::level_at(const LogLevelKeys& keys, LogLevel usual, int64_t now) {
  if (!(keys == keys_)) {
    keys_ = keys;
    const auto written = parse_time(keys.valid_time);
    since_ = written && *written < now ? *written : now;
  }
  if (keys.level.empty() || now >= since_ + int64_t{3600} * keys.valid_hours) return usual;
  return parse_level(lower(keys.level)).value_or(usual);
}

}  // namespace phalanx::apps
