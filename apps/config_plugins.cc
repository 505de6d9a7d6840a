#include "apps/config_plugins.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "apps/config_section.h"
#include "phalanx/base/json.h"
#include "phalanx/engine/engine_options.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

constexpr int kDepth = 4;
constexpr IntegerRange kDraft{1, engine::kMostDraftTokens};
constexpr int64_t kUsualDraft = 5;

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

// One kind of speculation, from one place.
void claim(const std::string& where, bool by_model, Problems& problems, PluginConfig& plugins) {
  if (!plugins.draft_where.empty() &&
      (plugins.draft_where != where || by_model || !plugins.draft_model.empty()))
    problems.add({.what = "speculation is asked for twice",
                  .where = where,
                  .found = fmt::format("here and by {}", plugins.draft_where == where
                                                             ? "another plugin_type"
                                                             : plugins.draft_where),
                  .expected = "one of prompt look-up and a draft model, in one place",
                  .fix = "remove one of them"});
  plugins.draft_where = where;
}

void read_draft_model(ConfigSection& section, const std::string& where, Problems& problems,
                      PluginConfig& plugins) {
  claim(where, true, problems, plugins);
  std::string model;
  if (section.string("model", Need::kMandatory, model) && model.empty())
    section.problem("model", "no draft model is named", "\"\"", "the directory of a checkpoint",
                    "name it, or remove the speculation");
  plugins.draft_model = model;
  plugins.draft_tokens = kUsualDraft;
  section.integer("num_speculative_tokens", Need::kOptional, kDraft, plugins.draft_tokens);
  // It is not cut; vLLM's users write this.
  int64_t ranks = 1;
  section.integer("draft_tensor_parallel_size", Need::kOptional, {1, 1}, ranks);
}

void read_ngram(ConfigSection& section, const std::string& where, Problems& problems,
                PluginConfig& plugins) {
  claim(where, false, problems, plugins);
  plugins.draft_tokens = kUsualDraft;
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
                      "ngram, la or memory_decoding, which guess without draft layers, or draft_model",
                      "write one of these, or remove mtp");
    } else if (type == "ngram") {
      read_ngram(section, where, problems, plugins);
    } else if (type == "draft_model") {
      read_draft_model(section, where, problems, plugins);
    } else if (type == "memory_decoding") {
      claim(where, false, problems, plugins);
      plugins.draft_tokens = 16;
      section.integer("decoding_length", Need::kOptional, kDraft, plugins.draft_tokens);
      section.without_effect({"dynamic_algo"});
    } else if (type == "la") {
      claim(where, false, problems, plugins);
      int64_t level = 4;
      section.integer("level", Need::kOptional, {3, 16}, level);
      plugins.draft_tokens = level - 1;
      section.without_effect({"window", "guess_set_size"});
    } else {
      section.problem("plugin_type", "unknown plugin", fmt::format("\"{}\"", type),
                      "prefix_cache, splitfuse, la, memory_decoding, ngram or draft_model",
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
  const bool by_model = object->contains("model");
  std::string method = by_model ? "draft_model" : "ngram";
  const Need need = by_model ? Need::kOptional : Need::kMandatory;
  if (section.string("method", need, method) && method != "ngram" && method != "draft_model")
    section.problem("method", "unknown method of speculation", fmt::format("\"{}\"", method),
                    R"("ngram" or "draft_model")", R"(write "method": "ngram")");
  if (method == "draft_model") {
    read_draft_model(section, where, problems, plugins);
  } else {
    read_ngram(section, where, problems, plugins);
  }
  section.finish();
}

void read_draft_options(const std::string& model, int64_t tokens, Problems& problems,
                        PluginConfig& plugins) {
  if (model.empty()) {
    if (tokens != 0)
      problems.add({.what = "guesses of no draft model",
                    .where = "--draft-tokens",
                    .found = std::to_string(tokens),
                    .expected = "--draft-model DIR beside it",
                    .fix = "name the draft model, or leave --draft-tokens away"});
    return;
  }
  claim("--draft-model", true, problems, plugins);
  plugins.draft_model = model;
  plugins.draft_tokens = tokens == 0 ? kUsualDraft : tokens;
}

bool runs_draft_model(const NodeConfig& config) {
  if (config.plugins.draft_model.empty() || config.table.servers.empty()) return false;
  return config.table.server_of_rank(0) == config.own_server;
}

}  // namespace phalanx::apps
