#include "apps/generation_defaults.h"

#include <fmt/format.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "phalanx/base/error.h"
#include "phalanx/base/json.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

template <typename T>
std::optional<T> number(const json& j, const char* key, const std::string& file) {
  const auto it = j.find(key);
  if (it == j.end() || it->is_null()) return std::nullopt;
  if (!it->is_number())
    throw Error(Code::kInvalidArgument,
                fmt::format("{}: {}: found {}, expected a number", file, key, it->dump()));
  return it->get<T>();
}

std::vector<int32_t> eos_ids(const json& j, const std::string& file) {
  const auto it = j.find("eos_token_id");
  if (it == j.end() || it->is_null()) return {};
  if (it->is_number_integer()) return {it->get<int32_t>()};
  std::vector<int32_t> ids;
  if (it->is_array())
    for (const json& id : *it)
      if (id.is_number_integer()) ids.push_back(id.get<int32_t>());
  if (ids.empty() || ids.size() != it->size())
    throw Error(Code::kInvalidArgument,
                fmt::format("{}: eos_token_id: found {}, expected a token id or a list of them",
                            file, it->dump()));
  return ids;
}

}  // namespace

api::GenerationDefaults read_generation_defaults(const std::string& model_directory) {
  api::GenerationDefaults d;
  const std::string file = model_directory + "/generation_config.json";
  if (std::filesystem::exists(file)) {
    const json j = read_json_file(file);
    d.temperature = number<float>(j, "temperature", file);
    d.top_p = number<float>(j, "top_p", file);
    d.top_k = number<int32_t>(j, "top_k", file);
    d.repetition_penalty = number<float>(j, "repetition_penalty", file);
    if (const auto it = j.find("do_sample"); it != j.end() && it->is_boolean())
      d.do_sample = it->get<bool>();
    else
      d.do_sample = d.temperature.has_value() || d.top_p.has_value() || d.top_k.has_value();
    d.eos_token_ids = eos_ids(j, file);
  } else {
    d.do_sample = false;
  }
  if (d.eos_token_ids.empty()) {
    const std::string config = model_directory + "/config.json";
    d.eos_token_ids = eos_ids(read_json_file(config), config);
  }
  return d;
}

std::optional<bool> read_thinking_default(const std::string& model_directory) {
  const std::string file = model_directory + "/tokenizer_config.json";
  if (!std::filesystem::exists(file)) return std::nullopt;
  const json j = read_json_file(file);
  const auto it = j.find("enable_thinking");
  if (it == j.end() || !it->is_boolean()) return std::nullopt;
  return it->get<bool>();
}

}  // namespace phalanx::apps
