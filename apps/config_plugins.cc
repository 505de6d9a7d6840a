#include "apps/config_plugins.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "apps/config_section.h"
#include "phalanx/base/json.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

constexpr int kDepth = 4;
constexpr IntegerRange kDraft{1, 16};

std::optional<json> parse(const std::string& text, const std::string& where, Problems& problems) {
  std::string found;
  try {
    json value = parse_json(text, where, kDepth);
    if (value.is_object()) return value;
    found = value.type_name();
  } catch (const std::exception& error) {
    found = error.what();
  }
  problems.add({.what = "not a JSON object",
                .where = where,
                .found = found,
                .expected = R"({"plugin_type": "prefix_cache"} or the like)",
                .fix = "write a JSON object, or remove it"});
  return std::nullopt;
}

void read_ngram(ConfigSection& section, PluginConfig& plugins) {
  plugins.draft_tokens = 5;
  section.integer("num_speculative_tokens", Need::kOptional, kDraft, plugins.draft_tokens);
  section.integer("prompt_lookup_max", Need::kOptional, kDraft, plugins.lookup_most);
  plugins.lookup_least = std::min(plugins.lookup_least, plugins.lookup_most);
  section.integer("prompt_lookup_min", Need::kOptional, {1, plugins.lookup_most},
                  plugins.lookup_least);
}

}  // namespace

void read_plugin_params(const json& value, const std::string& where, Problems& problems,
                        std::vector<std::string>& ignored, PluginConfig& plugins) {
  json object = value;
  if (value.is_string()) {
    const auto text = value.get<std::string>();
    if (text.empty()) return;
    auto parsed = parse(text, where, problems);
    if (!parsed) return;
    object = std::move(*parsed);
  } else if (!value.is_object()) {
    problems.add({.what = "wrong type",
                          .where = where,
                          .found = value.type_name(),
                          .expected = "an object, or a string with one",
                          .fix = R"(write {"plugin_type": "prefix_cache"} or remove it)"});
    return;
  }
  ConfigSection section(object, where, "plugin_params", problems, ignored);
  section.boolean("prefix_cache", Need::kOptional, plugins.prefix_cache);
  section.boolean("chunked_prefill", Need::kOptional, plugins.chunked_prefill);
  std::string types;
  section.string("plugin_type", Need::kOptional, types);
  for (size_t begin = 0; begin < types.size();) {
    const size_t end = std::min(types.find(',', begin), types.size());
    const std::string type = types.substr(begin, end - begin);
    begin = end + 1;
    if (type == "prefix_cache" || type == "splitfuse") continue;
    if (type == "mtp") {
      section.without_effect({"num_speculative_tokens"});
      section.problem("plugin_type", "speculation by draft layers is not supported", "\"mtp\"",
                      "ngram, la or memory_decoding, which guess without draft layers",
                      "write one of these, or remove mtp");
    } else if (type == "ngram") {
      read_ngram(section, plugins);
    } else if (type == "memory_decoding") {
      plugins.draft_tokens = 16;
      section.integer("decoding_length", Need::kOptional, kDraft, plugins.draft_tokens);
      section.without_effect({"dynamic_algo"});
    } else if (type == "la") {
      int64_t level = 4;
      section.integer("level", Need::kOptional, {3, 16}, level);
      plugins.draft_tokens = level - 1;
      section.without_effect({"window", "guess_set_size"});
    } else {
      section.problem("plugin_type", "unknown plugin", fmt::format("\"{}\"", type),
                      "prefix_cache, splitfuse, la, memory_decoding or ngram",
                      "correct the name or remove plugin_params");
    }
  }
  section.finish();
}

void read_speculative_config(const std::string& text, Problems& problems,
                             std::vector<std::string>& ignored, PluginConfig& plugins) {
  const std::string where = "--speculative-config";
  const auto object = parse(text, where, problems);
  if (!object) return;
  ConfigSection section(*object, where, "", problems, ignored);
  std::string method = "ngram";
  if (section.string("method", Need::kMandatory, method) && method != "ngram")
    section.problem("method", "unknown method of speculation", fmt::format("\"{}\"", method),
                    "\"ngram\"", R"(write "method": "ngram")");
  read_ngram(section, plugins);
  section.finish();
}

}  // namespace phalanx::apps
