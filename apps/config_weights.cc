#include "apps/config_weights.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "phalanx/base/guarded_file.h"
#include "phalanx/base/json.h"

namespace phalanx::apps {
namespace {

constexpr size_t kLongestPath = 4096;
constexpr size_t kLongestName = 255;
constexpr int kDeepest = 32;
constexpr mode_t kDirectoryMode = 0750;
constexpr int64_t kLargestModelJson = int64_t{500} << 20;

void check_path_text(const std::string& path, const std::string& where, Problems& problems) {
  const auto bad = std::find_if_not(path.begin(), path.end(), [](unsigned char c) {
    return std::isalnum(c) || std::strchr("_./-", c) != nullptr;
  });
  if (bad != path.end())
    problems.add(
        {.what = "unexpected character in the path",
         .where = where,
         .found = fmt::format("\"{}\" at byte {} of \"{}\"", *bad, bad - path.begin(), path),
         .expected = "letters, digits, '_', '.', '/', '-'",
         .fix = "rename or move it"});
  int depth = 0;
  for (const auto& part : std::filesystem::path(path)) {
    if (part == "..")
      problems.add({.what = "\"..\" in the path",
                    .where = where,
                    .found = path,
                    .expected = "a path without \"..\"",
                    .fix = "write the path directly"});
    if (part.string().size() > kLongestName)
      problems.add({.what = "a name in the path is too long",
                    .where = where,
                    .found = fmt::format("{} bytes", part.string().size()),
                    .expected = fmt::format("at most {}", kLongestName),
                    .fix = "rename it"});
    if (part != "/" && part != "." && !part.empty()) ++depth;
  }
  if (path.size() > kLongestPath || depth > kDeepest)
    problems.add({.what = "the path is too long or too deep",
                  .where = where,
                  .found = fmt::format("{} bytes, {} levels", path.size(), depth),
                  .expected = fmt::format("at most {} bytes, {} levels", kLongestPath, kDeepest),
                  .fix = "move the directory"});
}

// Existence, type, link, owner, mode. False if there is no directory to look into.
bool check_directory(const std::string& path, const std::string& where, const WeightRules& rules,
                     Problems& problems, Problems& warnings) {
  struct stat st {};
  std::string bare = path;
  while (bare.size() > 1 && bare.back() == '/') bare.pop_back();
  if (::lstat(bare.c_str(), &st) != 0) {
    problems.add({.what = "no weight directory",
                  .where = where,
                  .found = fmt::format("\"{}\": {}", path, std::strerror(errno)),
                  .expected = "a directory with config.json, a tokenizer and *.safetensors",
                  .fix = "correct the path, or copy the weights there"});
    return false;
  }
  if (S_ISLNK(st.st_mode)) {
    std::error_code error;
    Problem link{
        .what = "the weight directory is a symbolic link",
        .where = where,
        .found = fmt::format("{} -> {}", bare, std::filesystem::read_symlink(bare, error).string()),
        .expected = "the directory itself",
        .fix = "write the target's path"};
    (rules.strict ? problems : warnings).add(std::move(link));
    if (::stat(bare.c_str(), &st) != 0) return false;
  }
  if (!S_ISDIR(st.st_mode)) {
    const bool gguf = bare.ends_with(".gguf");
    problems.add({.what = "not a directory",
                  .where = where,
                  .found = bare,
                  .expected = "a directory with config.json, a tokenizer and *.safetensors",
                  .fix = gguf ? fmt::format("import it first: phalanx import {} <directory>", bare)
                              : "name the directory that holds the weights"});
    return false;
  }
  if (::access(bare.c_str(), R_OK | X_OK) != 0) {
    problems.add({.what = "the weight directory cannot be read",
                  .where = where,
                  .found = std::strerror(errno),
                  .expected = "read and search permission",
                  .fix = fmt::format("chmod u+rx {}", bare)});
    return false;
  }
  if (::getuid() == 0) return true;  // root may use anyone's weights
  Problems& loose = rules.strict && rules.check_modes ? problems : warnings;
  if (st.st_uid != ::getuid())
    loose.add({.what = "the weight directory belongs to somebody else",
               .where = where,
               .found = fmt::format("owner uid {} of {}", st.st_uid, bare),
               .expected = fmt::format("uid {}", ::getuid()),
               .fix = fmt::format("chown -R {} {}", ::getuid(), bare)});
  if ((st.st_mode & 0777 & ~kDirectoryMode) != 0)
    loose.add({.what = "the weight directory's mode is too open",
               .where = where,
               .found = fmt::format("{:04o} on {}", st.st_mode & 0777, bare),
               .expected = fmt::format("at most {:04o}", kDirectoryMode),
               .fix = fmt::format("chmod 750 {} (and chmod 640 on the files in it)", bare)});
  return true;
}

std::optional<int64_t> positive_integer(const nlohmann::json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end() || !it->is_number_integer() || it->get<int64_t>() < 1) return {};
  return it->get<int64_t>();
}

// The rest of what is read of a checkpoint: links and open modes. Weights themselves only warn.
void check_other_files(const std::string& directory, const WeightRules& rules, Problems& problems,
                       Problems& warnings) {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
    const std::string name = entry.path().filename();
    const bool weights = name.ends_with(".safetensors");
    if (name == "config.json" || name == "generation_config.json" ||
        !(weights || name.ends_with(".json") || name.ends_with(".jinja") || name.ends_with(".model")))
      continue;
    Problems& findings = rules.strict && !weights ? problems : warnings;
    (void)check_guarded_file(entry.path().string(),
                             {.root_exempt = true, .min_bytes = 0, .max_bytes = INT64_MAX}, findings,
                             warnings);
  }
}

FileRule model_json_rule() { return {.root_exempt = true, .max_bytes = kLargestModelJson}; }

}  // namespace

WeightFacts check_weight_directory(const std::string& directory, const std::string& where,
                                   const WeightRules& rules, Problems& problems,
                                   Problems& warnings) {
  WeightFacts facts;
  if (directory.empty()) {
    problems.add({.what = "empty path",
                  .where = where,
                  .found = "\"\"",
                  .expected = "the directory of the weights",
                  .fix = "write its path"});
    return facts;
  }
  check_path_text(directory, where, rules.strict ? problems : warnings);
  if (!check_directory(directory, where, rules, problems, warnings)) return facts;

  const std::string model_config = (std::filesystem::path(directory) / "config.json").string();
  if (::access(model_config.c_str(), F_OK) != 0) {
    problems.add({.what = "the weight directory has no config.json",
                  .where = where,
                  .found = fmt::format("{}: {}", model_config, std::strerror(errno)),
                  .expected = "the model's own config.json beside its weights",
                  .fix = "copy the whole checkpoint directory"});
    return facts;
  }
  Problems refused;
  std::string text = read_guarded_file(model_config, model_json_rule(), refused, warnings);
  if (rules.strict) {
    problems.add_all(refused);
  } else if (!refused.empty()) {
    warnings.add_all(refused);
    try {
      text = read_text_file(model_config, kLargestModelJson);
    } catch (const Error& error) {
      problems.add({.what = error.what(), .fix = "make the file readable"});
    }
  }
  if (!text.empty()) {
    try {
      const nlohmann::json model =
          parse_json(text, model_config, std::max(10, rules.max_json_depth));
      if (!model.is_object()) {
        problems.add({.what = "wrong type",
                      .where = model_config,
                      .found = model.type_name(),
                      .expected = "a JSON object",
                      .fix = "restore the file of the checkpoint"});
      } else {
        facts.query_heads = positive_integer(model, "num_attention_heads");
        facts.max_positions = positive_integer(model, "max_position_embeddings");
      }
    } catch (const Error& error) {
      problems.add({.what = error.what(), .fix = "restore the file of the checkpoint"});
    }
  }

  check_other_files(directory, rules, problems, warnings);
  const std::string generation =
      (std::filesystem::path(directory) / "generation_config.json").string();
  if (::access(generation.c_str(), F_OK) == 0) {
    Problems findings;
    const std::string defaults =
        read_guarded_file(generation, model_json_rule(), findings, warnings);
    warnings.add_all(findings);
    if (!defaults.empty()) {
      try {
        (void)parse_json(defaults, generation, std::max(10, rules.max_json_depth));
      } catch (const Error& error) {
        warnings.add(
            {.what = error.what(), .fix = "correct it; until then requests have no defaults"});
      }
    }
  }
  return facts;
}

}  // namespace phalanx::apps
