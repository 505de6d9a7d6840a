#include "phalanx/text/chat_template.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/base/json.h"
#include "phalanx/text/crate_call.h"
#include "phalanx/text/large_stack.h"

namespace phalanx::text {
namespace {

using nlohmann::json;

constexpr int64_t kMaxTemplateBytes = 16 << 20;
constexpr int64_t kMaxConfigBytes = 64 << 20;
// About one instruction or 64 bytes each: a long conversation takes some 100,000.
constexpr uint64_t kFuel = 2'000'000;
// The crate compiles, prints and frees expressions and values by recursion, up to about 1 KB a level: of
// a chain such as 1+1+1+... and of a list that was put into a list again and again.
constexpr size_t kClientStack = size_t{1} << 30;

PtxTemplate* compile(const std::string& source, const std::string& where) {
  PtxTemplate* handle = nullptr;
  PtxBytes error{};
  if (!ptx_template_compile(lend(source), &handle, &error))
    throw Error(Code::kInvalidArgument,
                fmt::format("{}: the chat template cannot be compiled: {}", where, take(error)));
  return handle;
}

bool has_file(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::exists(path, ignored);
}

std::string to_json_text(const json& value) {
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

// A special token is a text or an object with "content".
void read_special_tokens(const json& config, std::map<std::string, std::string>& tokens) {
  for (const auto& [key, value] : config.items()) {
    if (key == "additional_special_tokens" && value.is_array()) {
      json list = json::array();
      for (const json& token : value) {
        if (token.is_string()) list.push_back(token);
        if (token.is_object() && token.value("content", json()).is_string())
          list.push_back(token["content"]);
      }
      tokens[key] = to_json_text(list);
      continue;
    }
    if (!key.ends_with("_token") || key.starts_with("add_")) continue;
    if (value.is_string()) tokens[key] = to_json_text(value);
    if (value.is_object() && value.contains("content") && value["content"].is_string())
      tokens[key] = to_json_text(value["content"]);
  }
}

json read_object(const std::filesystem::path& path) {
  json object = read_json_file(path.string(), kMaxConfigBytes);
  if (!object.is_object())
    throw Error(Code::kInvalidArgument, fmt::format("{}: found a JSON {}, expected an object",
                                                    path.string(), object.type_name()));
  return object;
}

struct Sources {
  std::optional<std::string> plain;
  std::optional<std::string> tool_use;
};

// `value` is "chat_template" of a JSON file.
Sources read_sources(const json& value, const std::string& where) {
  Sources sources;
  if (value.is_string()) {
    sources.plain = value.get<std::string>();
    return sources;
  }
  const std::string expected = "expected a text or a list of {\"name\", \"template\"}";
  if (!value.is_array())
    throw Error(Code::kInvalidArgument, fmt::format("{}: chat_template: found a JSON {}, {}", where,
                                                    value.type_name(), expected));
  std::string names;
  for (const json& entry : value) {
    if (!entry.is_object() || !entry.contains("name") || !entry["name"].is_string() ||
        !entry.contains("template") || !entry["template"].is_string())
      throw Error(
          Code::kInvalidArgument,
          fmt::format("{}: chat_template: found an entry of another form, {}", where, expected));
    const std::string name = entry["name"];
    if (name == "default") sources.plain = entry["template"].get<std::string>();
    if (name == "tool_use") sources.tool_use = entry["template"].get<std::string>();
    names += (names.empty() ? "" : ", ") + name;
  }
  if (!sources.plain)
    throw Error(
        Code::kInvalidArgument,
        fmt::format("{}: chat_template: found a list of [{}], expected one named \"default\"",
                    where, names));
  return sources;
}

}  // namespace

std::shared_ptr<const ChatTemplate> ChatTemplate::load(const std::string& model_dir,
                                                       const std::string& override_file) {
  const std::filesystem::path dir(model_dir);
  std::shared_ptr<ChatTemplate> result(new ChatTemplate);
  Sources sources;
  for (const char* name : {"special_tokens_map.json", "tokenizer_config.json"}) {
    if (!has_file(dir / name)) continue;
    const json config = read_object(dir / name);
    read_special_tokens(config, result->special_tokens_);
    const auto found = config.find("chat_template");
    if (found == config.end() || found->is_null()) continue;
    result->where_ = (dir / name).string();
    sources = read_sources(*found, result->where_);
  }
  if (has_file(dir / "chat_template.json")) {
    result->where_ = (dir / "chat_template.json").string();
    const json file = read_object(dir / "chat_template.json");
    if (file.contains("chat_template"))
      sources = read_sources(file["chat_template"], result->where_);
  }
  std::string path = override_file;
  if (path.empty() && has_file(dir / "chat_template.jinja"))
    path = (dir / "chat_template.jinja").string();
  if (!path.empty()) {
    result->where_ = path;
    sources = {.plain = read_text_file(path, kMaxTemplateBytes)};
  }
  if (sources.plain) result->default_ = compile(*sources.plain, result->where_);
  if (sources.tool_use) result->tool_use_ = compile(*sources.tool_use, result->where_);
  if (result->empty()) result->where_ = model_dir;
  return result;
}

std::shared_ptr<const ChatTemplate> ChatTemplate::from_source(
    const std::string& source, const std::map<std::string, std::string>& special_tokens,
    const std::string& where) {
  std::shared_ptr<ChatTemplate> result(new ChatTemplate);
  result->where_ = where;
  for (const auto& [name, token] : special_tokens)
    result->special_tokens_[name] = to_json_text(json(token));
  result->default_ = compile(source, where);
  return result;
}

std::shared_ptr<const ChatTemplate> ChatTemplate::with_source(const std::string& source,
                                                              const std::string& where) const {
  if (source.size() > kMaxClientTemplate)
    throw Error(Code::kInvalidArgument,
                fmt::format("{}: found {} bytes, expected at most {}", where, source.size(),
                            kMaxClientTemplate));
  std::shared_ptr<ChatTemplate> result(new ChatTemplate);
  result->where_ = where;
  result->special_tokens_ = special_tokens_;
  result->from_client_ = true;
  on_large_stack(kClientStack, [&] { result->default_ = compile(source, where); });
  return result;
}

ChatTemplate::~ChatTemplate() {
  ptx_template_free(default_);
  ptx_template_free(tool_use_);
}

std::string ChatTemplate::render(const ChatInput& input) const {
  if (!from_client_) return render_here(input);
  std::string prompt;
  on_large_stack(kClientStack, [&] { prompt = render_here(input); });
  return prompt;
}

std::string ChatTemplate::render_here(const ChatInput& input) const {
  if (empty())
    throw Error(
        Code::kFailedPrecondition,
        fmt::format("{}: the checkpoint has no chat template. Fix: use the completions route, "
                    "or put a chat_template.jinja there",
                    where_));
  // In the order of precedence, lowest first.
  std::map<std::string, std::string> variables = special_tokens_;
  if (!input.extra_json.empty()) {
    const json extra = parse_json(input.extra_json, "template variables");
    if (!extra.is_object())
      throw Error(Code::kInvalidArgument,
                  fmt::format("template variables: found a JSON {}, expected an object",
                              extra.type_name()));
    const auto ordered = nlohmann::ordered_json::parse(input.extra_json);
    for (const auto& [key, value] : ordered.items())
      variables[key] = value.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  }
  variables["messages"] = input.messages_json;
  variables["tools"] = input.tools_json.empty() ? "null" : input.tools_json;
  variables["documents"] = input.documents_json.empty() ? "null" : input.documents_json;
  variables["add_generation_prompt"] = input.add_generation_prompt ? "true" : "false";

  std::vector<PtxText> names;
  std::vector<PtxText> values;
  for (const auto& [name, value] : variables) {
    names.push_back(lend(name));
    values.push_back(lend(value));
  }
  const int64_t now = input.now.value_or(std::chrono::duration_cast<std::chrono::seconds>(
                                             std::chrono::system_clock::now().time_since_epoch())
                                             .count());
  // A large conversation pays for its own size.
  const uint64_t extra = (input.messages_json.size() + input.tools_json.size()) / 2;
  const uint64_t fuel = kFuel + (from_client_ ? std::min(extra, kFuel) : extra);
  const bool with_tools = !input.tools_json.empty() && tool_use_ != nullptr;
  PtxBytes out{};
  PtxBytes error{};
  if (!ptx_template_render(with_tools ? tool_use_ : default_, names.data(), values.data(),
                           names.size(), now, fuel, &out, &error))
    throw Error(
        Code::kInvalidArgument,
        fmt::format("the chat template ({}) refuses this conversation: {}", where_, take(error)));
  return take(out);
}

}  // namespace phalanx::text
