#include "phalanx/weights/adapter_config.h"

#include <fmt/format.h>
#include <re2/re2.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "phalanx/base/json.h"

namespace phalanx::weights {
namespace {

using nlohmann::json;

constexpr int64_t kMostBytes = 4 << 20;
constexpr size_t kMostPatterns = 4096;
constexpr size_t kLongestPattern = 4096;
constexpr int64_t kPatternMemory = 1 << 20;
constexpr double kMostAlpha = 1e6;
constexpr std::string_view kAllLinear = "all-linear";

// Keys that change nothing of what a trained adapter computes.
constexpr std::array<std::string_view, 15> kWithoutEffect = {
    "auto_mapping",     "base_model_name_or_path",
    "revision",         "inference_mode",
    "lora_dropout",     "loftq_config",
    "peft_version",     "megatron_core",
    "eva_config",       "qalora_group_size",
    "layers_pattern",   "ensure_weight_tying",
    "runtime_config",   "task_type",
    "trust_remote_code"};
// Keys that are read below.
constexpr std::array<std::string_view, 13> kRead = {"peft_type",           "r",
                                                    "lora_alpha",          "target_modules",
                                                    "use_rslora",          "bias",
                                                    "rank_pattern",        "alpha_pattern",
                                                    "fan_in_fan_out",      "init_lora_weights",
                                                    "layers_to_transform", "exclude_modules",
                                                    "modules_to_save"};

struct Refused {
  std::string_view key;
  std::string_view what;
  std::string_view fix;
};
constexpr std::string_view kMerge =
    "merge the adapter into its base model (PEFT's merge_and_unload) and serve that, or train one "
    "without it";
// Refused unless null, false or empty.
constexpr std::array<Refused, 9> kRefused = {{
    {"modules_to_save", "whole modules trained beside the adapter", kMerge},
    {"use_dora", "DoRA", kMerge},
    {"lora_bias", "a trained bias of lora_B", kMerge},
    {"use_qalora", "QALoRA", kMerge},
    {"layer_replication", "replicated layers", kMerge},
    {"trainable_token_indices", "trained token embeddings", kMerge},
    {"target_parameters", "adapters of parameters that are no linear layers", kMerge},
    {"alora_invocation_tokens", "an activated LoRA (aLoRA)", kMerge},
    {"exclude_modules", "excluded modules",
     "write the modules that are adapted into target_modules, and no exclude_modules"},
}};

bool is_nothing(const json& value) {
  return value.is_null() || (value.is_boolean() && !value.get<bool>()) ||
         ((value.is_object() || value.is_array() || value.is_string()) && value.empty());
}

std::string shown(const json& value) {
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > 100) text = text.substr(0, 97) + "...";
  return text;
}

// Of a pattern whose matching takes time proportional to the text, whatever it is.
std::unique_ptr<re2::RE2> compile(const std::string& pattern, const std::string& where,
                                  Problems& problems) {
  re2::RE2::Options options;
  options.set_log_errors(false);
  options.set_max_mem(kPatternMemory);
  auto compiled = pattern.size() > kLongestPattern
                      ? nullptr
                      : std::make_unique<re2::RE2>(re2::StringPiece(pattern), options);
  if (compiled != nullptr && compiled->ok()) return compiled;
  problems.add(
      {.what = "regular expression that cannot be used",
       .where = where,
       .found = pattern.size() > kLongestPattern ? fmt::format("{} bytes", pattern.size())
                                                 : fmt::format("\"{}\"", pattern.substr(0, 100)),
       .expected =
           compiled == nullptr
               ? fmt::format("at most {} bytes", kLongestPattern)
               : fmt::format("one without look-around and back-references ({})", compiled->error()),
       .fix = "write the modules' names as a list"});
  return nullptr;
}

bool ends_with_module(std::string_view module, std::string_view target) {
  return module == target || (module.size() > target.size() && module.ends_with(target) &&
                              module[module.size() - target.size() - 1] == '.');
}

// 3 of "model.layers.3.self_attn.q_proj".
std::optional<int64_t> layer_of(std::string_view module) {
  constexpr std::string_view kLayers = "layers.";
  const size_t at = module.find(kLayers);
  if (at == std::string_view::npos) return {};
  int64_t number = 0;
  size_t digits = 0;
  for (size_t i = at + kLayers.size();
       i < module.size() && std::isdigit(static_cast<unsigned char>(module[i])) != 0 && digits < 9;
       ++i, ++digits)
    number = number * 10 + (module[i] - '0');
  return digits == 0 ? std::nullopt : std::optional(number);
}

}  // namespace

struct AdapterConfig::State {
  struct Pattern {
    std::string text;
    std::unique_ptr<re2::RE2> expression;
    double value = 0;
  };

  std::string path;
  int64_t rank = 0;
  double alpha = 0;
  bool rslora = false;
  bool all_linear = false;
  std::vector<std::string> names;        // target_modules as a list
  std::unique_ptr<re2::RE2> expression;  // or as an expression
  std::vector<int64_t> layers;           // layers_to_transform; empty: all
  std::vector<Pattern> ranks, alphas;
  std::string targets_text;

  [[nodiscard]] std::string where(std::string_view key) const {
    return fmt::format("{}: {}", path, key);
  }

  void read(const json& config, Problems& problems);
  void read_targets(const json& config, Problems& problems);
  void read_layers(const json& config, Problems& problems);
  void read_patterns(const json& config, const char* key, double most, bool whole,
                     std::vector<Pattern>& patterns, Problems& problems) const;
  void refuse_others(const json& config, Problems& problems) const;
  double value_of(const std::vector<Pattern>& patterns, std::string_view key, double usual,
                  std::string_view module, Problems& problems) const;

  bool boolean(const json& config, const char* key, Problems& problems) const {
    const auto at = config.find(key);
    if (at == config.end() || at->is_null()) return false;
    if (at->is_boolean()) return at->get<bool>();
    problems.add({.what = "wrong type",
                  .where = where(key),
                  .found = shown(*at),
                  .expected = "true or false"});
    return false;
  }
};

void AdapterConfig::State::read_targets(const json& config, Problems& problems) {
  const auto at = config.find("target_modules");
  const auto refuse = [&](const std::string& found) {
    problems.add({.what = "no modules to adapt",
                  .where = where("target_modules"),
                  .found = found,
                  .expected = "a list of module names, a regular expression or \"all-linear\"",
                  .fix = "save the adapter again with PEFT, or write the names"});
  };
  if (at == config.end()) return refuse("no such key");
  targets_text = shown(*at);
  if (at->is_string()) {
    const auto& text = at->get_ref<const std::string&>();
    all_linear = text == kAllLinear;
    if (!all_linear) expression = compile(text, where("target_modules"), problems);
    return;
  }
  if (!at->is_array() || at->empty() || at->size() > kMostPatterns) return refuse(targets_text);
  for (const json& name : *at) {
    if (!name.is_string() || name.get_ref<const std::string&>().empty())
      return refuse(fmt::format("{} in the list", shown(name)));
    names.push_back(name.get<std::string>());
  }
}

void AdapterConfig::State::read_layers(const json& config, Problems& problems) {
  const auto at = config.find("layers_to_transform");
  if (at == config.end() || at->is_null()) return;
  const json list = at->is_array() ? *at : json::array({*at});
  for (const json& layer : list) {
    if (layer.is_number_unsigned() && layer.get<uint64_t>() < 100000) {
      layers.push_back(layer.get<int64_t>());
      continue;
    }
    problems.add({.what = "not a layer",
                  .where = where("layers_to_transform"),
                  .found = shown(layer),
                  .expected = "numbers of layers, from 0"});
    return;
  }
  const auto pattern = config.find("layers_pattern");
  if (layers.empty() || pattern == config.end() || is_nothing(*pattern) || *pattern == "layers" ||
      *pattern == json::array({"layers"}))
    return;
  problems.add({.what = "layers by another name",
                .where = where("layers_pattern"),
                .found = shown(*pattern),
                .expected = "\"layers\" or null",
                .fix = "the layers of every family here are model.layers.N"});
}

void AdapterConfig::State::read_patterns(const json& config, const char* key, double most,
                                         bool whole, std::vector<Pattern>& patterns,
                                         Problems& problems) const {
  const auto at = config.find(key);
  if (at == config.end() || is_nothing(*at)) return;
  if (!at->is_object() || at->size() > kMostPatterns) {
    problems.add({.what = "wrong type",
                  .where = where(key),
                  .found = shown(*at),
                  .expected = fmt::format("an object of at most {} patterns", kMostPatterns)});
    return;
  }
  for (const auto& [pattern, value] : at->items()) {
    const std::string place = fmt::format("{}.{}", where(key), pattern.substr(0, 100));
    const double number = value.is_number() ? value.get<double>() : 0;
    if (!(number > 0 && number <= most) || (whole && number != std::floor(number))) {
      problems.add({.what = "value that cannot be used",
                    .where = place,
                    .found = shown(value),
                    .expected = fmt::format("{} above 0, at most {}",
                                            whole ? "a whole number" : "a number", most)});
      continue;
    }
    auto compiled = compile("(.*\\.)?(" + pattern + ")", place, problems);
    if (compiled != nullptr) patterns.push_back({pattern, std::move(compiled), number});
  }
}

void AdapterConfig::State::refuse_others(const json& config, Problems& problems) const {
  for (const Refused& refused : kRefused) {
    const auto at = config.find(refused.key);
    if (at == config.end() || is_nothing(*at)) continue;
    problems.add({.what = fmt::format("{} cannot be served", refused.what),
                  .where = where(refused.key),
                  .found = shown(*at),
                  .expected = "null or false",
                  .fix = std::string(refused.fix)});
  }
  if (const auto at = config.find("bias"); at != config.end() && !is_nothing(*at) && *at != "none")
    problems.add({.what = "trained biases cannot be served",
                  .where = where("bias"),
                  .found = shown(*at),
                  .expected = "\"none\"",
                  .fix = std::string(kMerge)});
  if (const auto at = config.find("task_type");
      at != config.end() && !is_nothing(*at) && *at != "CAUSAL_LM")
    problems.add({.what = "adapter for another task",
                  .where = where("task_type"),
                  .found = shown(*at),
                  .expected = "\"CAUSAL_LM\" or null",
                  .fix = "use an adapter that was trained to generate text"});
  const auto init = config.find("init_lora_weights");
  static constexpr std::array<std::string_view, 3> kPlain = {"gaussian", "eva", "orthogonal"};
  if (init != config.end() && init->is_string() &&
      std::find(kPlain.begin(), kPlain.end(), init->get_ref<const std::string&>()) == kPlain.end())
    problems.add({.what = "adapter to a base model whose weights were changed at its start",
                  .where = where("init_lora_weights"),
                  .found = shown(*init),
                  .expected = "true, false, \"gaussian\", \"eva\" or \"orthogonal\"",
                  .fix = "save it with PEFT's path_initial_model_for_weight_conversion, which "
                         "makes it an adapter to the unchanged base"});
  for (const auto& [key, value] : config.items()) {
    const auto known = [&](const auto& list) {
      return std::find(list.begin(), list.end(), key) != list.end();
    };
    const bool named = std::any_of(kRefused.begin(), kRefused.end(),
                                   [&](const Refused& r) { return r.key == key; });
    if (named || known(kWithoutEffect) || known(kRead) || is_nothing(value)) continue;
    problems.add({.what = "key that this version does not know",
                  .where = where(key),
                  .found = shown(value),
                  .expected = "null, false or no such key: it may change what the adapter computes",
                  .fix =
                      "remove it if it has no part in inference; else merge the adapter into its "
                      "base model"});
  }
}

void AdapterConfig::State::read(const json& config, Problems& problems) {
  if (!config.is_object()) {
    problems.add({.what = "wrong type",
                  .where = path,
                  .found = config.type_name(),
                  .expected = "a JSON object",
                  .fix = "restore the file of the adapter"});
    return;
  }
  if (const auto at = config.find("peft_type"); at == config.end() || *at != "LORA")
    problems.add({.what = "not a LoRA adapter",
                  .where = where("peft_type"),
                  .found = at == config.end() ? "no such key" : shown(*at),
                  .expected = "\"LORA\"",
                  .fix = "other methods of PEFT have no kernels here: merge it "
                         "into its base model where PEFT can"});
  const auto r = config.find("r");
  if (r != config.end() && r->is_number_integer() && *r >= 1 && *r <= kMostAdapterRank)
    rank = r->get<int64_t>();
  else
    problems.add({.what = "rank that cannot be used",
                  .where = where("r"),
                  .found = r == config.end() ? "no such key" : shown(*r),
                  .expected = fmt::format("1 to {}", kMostAdapterRank)});
  const auto a = config.find("lora_alpha");
  if (a != config.end() && a->is_number() && a->get<double>() > 0 && a->get<double>() <= kMostAlpha)
    alpha = a->get<double>();
  else
    problems.add({.what = "scale that cannot be used",
                  .where = where("lora_alpha"),
                  .found = a == config.end() ? "no such key" : shown(*a),
                  .expected = fmt::format("a number above 0, at most {}", kMostAlpha)});
  rslora = boolean(config, "use_rslora", problems);
  if (boolean(config, "fan_in_fan_out", problems))
    problems.add({.what = "transposed weights cannot be served",
                  .where = where("fan_in_fan_out"),
                  .found = "true",
                  .expected = "false",
                  .fix =
                      "it belongs to base models whose layers are stored [in, out], which none of "
                      "the families here is"});
  read_targets(config, problems);
  read_layers(config, problems);
  read_patterns(config, "rank_pattern", static_cast<double>(kMostAdapterRank), true, ranks,
                problems);
  read_patterns(config, "alpha_pattern", kMostAlpha, false, alphas, problems);
  refuse_others(config, problems);
}

double AdapterConfig::State::value_of(const std::vector<Pattern>& patterns, std::string_view key,
                                      double usual, std::string_view module,
                                      Problems& problems) const {
  const Pattern* found = nullptr;
  for (const Pattern& pattern : patterns) {
    if (!re2::RE2::FullMatch(re2::StringPiece(module.data(), module.size()), *pattern.expression))
      continue;
    if (found != nullptr && found->value != pattern.value) {
      problems.add(
          {.what = "two patterns say different things",
           .where = where(key),
           .found = fmt::format("{}: \"{}\" and \"{}\"", module, found->text, pattern.text),
           .expected = "at most one pattern, or equal values, for each module",
           .fix = "write the modules' whole names"});
      break;
    }
    found = &pattern;
  }
  return found == nullptr ? usual : found->value;
}

AdapterConfig::AdapterConfig(const std::string& path, Problems& problems)
    : state_(std::make_unique<State>()) {
  state_->path = path;
  try {
    // A pipe would be waited for.
    std::error_code error;
    if (std::filesystem::exists(path, error) && !std::filesystem::is_regular_file(path, error))
      throw Error(Code::kInvalidArgument, fmt::format("{} is not a regular file", path));
    state_->read(read_json_file(path, kMostBytes, 16), problems);
  } catch (const Error& error) {
    problems.add({.what = error.what(),
                  .where = "adapter",
                  .fix = "give the directory that PEFT's save_pretrained wrote"});
  }
}
AdapterConfig::AdapterConfig(AdapterConfig&&) noexcept = default;
AdapterConfig& AdapterConfig::operator=(AdapterConfig&&) noexcept = default;
AdapterConfig::~AdapterConfig() = default;

bool AdapterConfig::targets(std::string_view module) const {
  const State& s = *state_;
  if (s.all_linear) return true;
  if (s.expression != nullptr)
    return re2::RE2::FullMatch(re2::StringPiece(module.data(), module.size()), *s.expression);
  for (const std::string& name : s.names) {
    if (module == name) return true;
    if (!ends_with_module(module, name)) continue;
    if (s.layers.empty()) return true;
    const auto layer = layer_of(module);
    return layer && std::find(s.layers.begin(), s.layers.end(), *layer) != s.layers.end();
  }
  return false;
}

int64_t AdapterConfig::rank_of(std::string_view module, Problems& problems) const {
  return static_cast<int64_t>(state_->value_of(
      state_->ranks, "rank_pattern", static_cast<double>(state_->rank), module, problems));
}

double AdapterConfig::scale_of(std::string_view module, Problems& problems) const {
  const auto rank = static_cast<double>(rank_of(module, problems));
  const double alpha =
      state_->value_of(state_->alphas, "alpha_pattern", state_->alpha, module, problems);
  return alpha / (state_->rslora ? std::sqrt(rank) : rank);
}

int64_t AdapterConfig::max_rank() const {
  double most = static_cast<double>(state_->rank);
  for (const State::Pattern& pattern : state_->ranks) most = std::max(most, pattern.value);
  return static_cast<int64_t>(most);
}

const std::string& AdapterConfig::targets_text() const { return state_->targets_text; }

}  // namespace phalanx::weights
