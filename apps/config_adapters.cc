#include "apps/config_adapters.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "apps/config_file.h"
#include "phalanx/base/json.h"
#include "phalanx/weights/adapter_config.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

constexpr IntegerRange kCount{0, 1024};
constexpr IntegerRange kRank{0, weights::kMostAdapterRank};
constexpr mode_t kDirectoryMode = 0750;
constexpr int64_t kMostListBytes = 1 << 20;

std::string text_of(const json& object, const char* key) {
  const auto at = object.find(key);
  return at != object.end() && at->is_string() ? at->get<std::string>() : "";
}

// One of LoraModules, or of --lora-modules as JSON.
void add_module(const json& entry, const char* base_key, const std::string& where,
                ModelConfig& model, Problems& problems) {
  const std::string name = entry.is_object() ? text_of(entry, "name") : "";
  const std::string path = entry.is_object() ? text_of(entry, "path") : "";
  if (name.empty() || path.empty()) {
    problems.add(
        {.what = "not a LoRA module",
         .where = where,
         .found = entry.dump(-1, ' ', true, json::error_handler_t::replace).substr(0, 100),
         .expected = fmt::format(R"({{"name": "...", "path": "...", "{}": "..."}})", base_key),
         .fix = "name the adapter and its directory"});
    return;
  }
  const std::string base = text_of(entry, base_key);
  const bool known = base == model.name || std::find(model.aliases.begin(), model.aliases.end(),
                                                     base) != model.aliases.end();
  if (!base.empty() && !known)
    problems.add(
        {.what = fmt::format("Lora base model not found. Please check. Lora name is {}", name),
         .where = where,
         .found = fmt::format("{} \"{}\"", base_key, base),
         .expected = fmt::format("\"{}\"", model.name),
         .fix = fmt::format("write \"{}\": \"{}\"", base_key, model.name)});
  model.lora_modules.push_back({.name = name, .path = path, .where = where});
}

void check_directory(const LoraModule& module, bool check_modes, Problems& problems) {
  struct stat st {};
  if (::stat(module.path.c_str(), &st) != 0 || !S_ISDIR(st.st_mode)) {
    problems.add({.what = fmt::format("no directory of the LoRA adapter '{}'", module.name),
                  .where = module.where,
                  .found = fmt::format("\"{}\"{}", module.path,
                                       S_ISDIR(st.st_mode) || st.st_mode != 0
                                           ? ""
                                           : fmt::format(": {}", std::strerror(errno))),
                  .expected = "a directory with adapter_config.json and adapter_model.safetensors",
                  .fix = "correct the path, or copy the adapter there, on every node"});
    return;
  }
  if (!check_modes || ::getuid() == 0) return;
  if ((st.st_mode & 0777 & ~kDirectoryMode) != 0)
    problems.add({.what = "the adapter directory's mode is too open",
                  .where = module.where,
                  .found = fmt::format("{:04o} on {}", st.st_mode & 0777, module.path),
                  .expected = fmt::format("at most {:04o}", kDirectoryMode),
                  .fix = fmt::format("chmod 750 {}", module.path)});
}

}  // namespace

void read_adapter_keys(ConfigSection& section, ModelConfig& model) {
  section.integer("maxLoras", Need::kOptional, kCount, model.max_loras);
  section.integer("maxLoraRank", Need::kOptional, kRank, model.max_lora_rank);
  const json* modules = section.array("LoraModules", Need::kOptional);
  if (modules == nullptr) return;
  model.lora_modules_named = true;
  Problems problems;
  for (size_t i = 0; i < modules->size(); ++i)
    add_module((*modules)[i], "baseModelName",
               fmt::format("{}[{}]", section.where("LoraModules"), i), model, problems);
  for (const Problem& problem : problems.list())
    section.problem("LoraModules", problem.what, problem.found, problem.expected, problem.fix);
}

void read_adapter_arguments(const ServeArguments& arguments, ModelConfig& model,
                            Problems& problems) {
  if (arguments.max_loras) model.max_loras = *arguments.max_loras;
  if (arguments.max_lora_rank) model.max_lora_rank = *arguments.max_lora_rank;
  if (arguments.lora_modules.empty()) return;
  model.lora_modules_named = true;
  model.lora_modules.clear();
  for (const std::string& text : arguments.lora_modules) {
    if (text.starts_with("{")) {
      try {
        add_module(parse_json(text, "--lora-modules", 4), "base_model_name", "--lora-modules",
                   model, problems);
      } catch (const Error& error) {
        problems.add({.what = error.what(), .where = "--lora-modules"});
      }
      continue;
    }
    const size_t equals = text.find('=');
    if (equals == std::string::npos || equals == 0 || equals + 1 == text.size()) {
      problems.add({.what = "not a LoRA module",
                    .where = "--lora-modules",
                    .found = fmt::format("\"{}\"", text.substr(0, 100)),
                    .expected = "name=path, or a JSON object with name and path",
                    .fix = "e.g. --lora-modules sql=/adapters/sql"});
      continue;
    }
    model.lora_modules.push_back({.name = text.substr(0, equals),
                                  .path = text.substr(equals + 1),
                                  .where = "--lora-modules"});
  }
}

void complete_adapters(ModelConfig& model, bool check_modes, Problems& problems) {
  const std::string list = model.weight_path + "/lora_adapter.json";
  if (!model.lora_modules_named && ::access(list.c_str(), F_OK) == 0) {
    try {
      const json object = read_json_file(list, kMostListBytes, 4);
      if (!object.is_object()) throw Error(Code::kInvalidArgument, list + ": expected an object");
      for (const auto& [name, path] : object.items())
        add_module({{"name", name}, {"path", path}}, "baseModelName",
                   fmt::format("{}: {}", list, name.substr(0, 100)), model, problems);
    } catch (const Error& error) {
      problems.add({.what = error.what(),
                    .where = "LoRA adapters",
                    .expected = R"({"adapter": "path"})",
                    .fix = "correct the file, or name the adapters in LoraModules"});
    }
  }
  std::set<std::string> names = {model.name};
  names.insert(model.aliases.begin(), model.aliases.end());
  for (const LoraModule& module : model.lora_modules) {
    if (!is_model_name(module.name))
      problems.add({.what = "not a name of an adapter",
                    .where = module.where,
                    .found = fmt::format("\"{}\"", module.name.substr(0, 100)),
                    .expected =
                        "1 to 256 of letters, digits, '_', '.', '-', the first and the last a "
                        "letter or digit",
                    .fix = "choose such a name; clients send it as \"model\""});
    else if (!names.insert(module.name).second)
      problems.add({.what = "name used twice",
                    .where = module.where,
                    .found = fmt::format("\"{}\"", module.name),
                    .expected = "a name that neither the model nor another adapter has",
                    .fix = "rename the adapter"});
    check_directory(module, check_modes, problems);
  }
  const auto count = static_cast<int64_t>(model.lora_modules.size());
  if (model.max_loras > 0 && count > model.max_loras)
    problems.add({.what = "more LoRA adapters than may be loaded",
                  .where = "maxLoras",
                  .found = fmt::format("{} adapters, maxLoras {}", count, model.max_loras),
                  .expected = "at most maxLoras of them",
                  .fix = fmt::format("raise maxLoras to {} or more", count)});
}

}  // namespace phalanx::apps
