#include "phalanx/api/field_rules.h"

#include <fmt/format.h>

#include <limits>
#include <nlohmann/json.hpp>

#include "phalanx/api/refusal.h"

namespace phalanx::api {
namespace {

using Type = FieldRule::Type;

constexpr double kInt32Max = std::numeric_limits<int32_t>::max();
constexpr double kInt64Max = 9223372036854775807.0;  // rounds to 2^63; see read()
constexpr double kFloatMax = std::numeric_limits<float>::max();
constexpr unsigned kOpenAi = kChat | kCompletions;
constexpr unsigned kLikeVllm = kChat | kCompletions | kVllm;
constexpr unsigned kLikeTgi = kTgi | kNative | kTritonText | kTritonTokens;
constexpr unsigned kAll = kLikeVllm | kLikeTgi | kMessages | kResponses;

constexpr const char* kStopSchema =
    R"({"oneOf":[{"type":"string","minLength":1},{"type":"array","items":{"type":"string","minLength":1}}]})";
constexpr const char* kGuidedSchema =
    R"({"type":"object","properties":{"type":{"type":"string"}},"required":["type"]})";

constexpr FieldRule kRules[] = {
    {.name = "max_tokens", .interfaces = kLikeVllm | kMessages, .type = Type::kInteger, .low = 1, .high = kInt32Max,
     .before = "Parameter max_tokens must be (0,2147483647], got ",
     .type_message = "Parameter max_tokens not number_integer", .about = "most output tokens"},
    {.name = "max_completion_tokens", .interfaces = kOpenAi, .type = Type::kInteger, .low = 1, .high = kInt32Max,
     .before = "Parameter max_completion_tokens must be (0,2147483647], got ",
     .type_message = "Parameter max_completion_tokens not number_integer", .about = "max_tokens; wins over it"},
    {.name = "max_output_tokens", .interfaces = kResponses, .type = Type::kInteger, .low = 1, .high = kInt32Max,
     .before = "Parameter max_output_tokens must be (0,2147483647], got ", .about = "most output tokens"},
    {.name = "max_new_tokens", .interfaces = kLikeTgi, .type = Type::kInteger, .low = 1, .high = kInt32Max,
     .before = "Parameter max_new_tokens must be in (0,2147483647], got ", .after = ".",
     .about = "most output tokens; default 20"},
    {.name = "min_tokens", .interfaces = kLikeVllm, .type = Type::kInteger, .low = 0, .high = kInt32Max,
     .before = "Parameter min_tokens must be in [0,2147483647], got ", .after = ".",
     .about = "no end before this many tokens"},
    {.name = "temperature", .interfaces = kLikeVllm | kMessages | kResponses, .type = Type::kNumber, .low = 0, .high = kFloatMax,
     .before = "Parameter temperature must be in (0.0,3.40282e+38], got ", .after = ".",
     .about = "0 is greedy"},
    {.name = "temperature", .interfaces = kLikeTgi, .type = Type::kNumber, .low = 0, .high = kFloatMax, .open_low = true,
     .before = "Parameter temperature must be in (0.0,3.40282e+38], got ", .after = "."},
    {.name = "top_k", .interfaces = kLikeVllm, .type = Type::kInteger, .low = -1, .high = kInt32Max, .not_zero = true,
     .before = "Parameter top_k must be in -1 || (0,2147483647], got ", .about = "-1 is off"},
    {.name = "top_k", .interfaces = kTgi | kNative | kMessages, .type = Type::kInteger, .low = 1, .high = kInt32Max,
     .before = "Parameter top_k must be in (0,2147483647], got ", .after = "."},
    {.name = "top_k", .interfaces = kTritonText | kTritonTokens, .type = Type::kInteger, .low = 0, .high = kInt32Max,
     .before = "Parameter top_k must be in [0,2147483647], got ", .after = "."},
    {.name = "top_p", .interfaces = kLikeVllm | kTritonText | kTritonTokens | kMessages | kResponses, .type = Type::kNumber, .low = 0, .high = 1,
     .open_low = true, .before = "Parameter top_p must be in (0.0,1.0], got ", .after = "."},
    {.name = "top_p", .interfaces = kTgi | kNative, .type = Type::kNumber, .low = 0, .high = 1, .open_low = true, .open_high = true,
     .before = "Parameter top_p must be in (0.0,1.0), got ", .after = "."},
    {.name = "min_p", .interfaces = kLikeVllm, .type = Type::kNumber, .low = 0, .high = 1,
     .before = "Parameter min_p must be in [0.0,1.0], got ", .after = "."},
    {.name = "typical_p", .interfaces = kTgi | kNative | kTritonText, .type = Type::kNumber, .low = 0, .high = 1, .open_low = true,
     .before = "Parameter typical_p must be in (0.0,1.0], got ", .after = "."},
    {.name = "repetition_penalty", .interfaces = kOpenAi, .type = Type::kNumber, .low = 0, .high = 2, .open_low = true,
     .before = "Parameter 'repetition_penalty' must be in (0.0, 2.0], got ", .after = "."},
    {.name = "repetition_penalty", .interfaces = kVllm | kLikeTgi, .type = Type::kNumber, .low = 0, .high = kFloatMax, .open_low = true,
     .before = "Parameter 'repetition_penalty' must be in (0.0, 3.40282e+38], got ", .after = "."},
    {.name = "presence_penalty", .interfaces = kLikeVllm, .type = Type::kNumber, .low = -2, .high = 2,
     .before = "Parameter presence_penalty not in [-2.0, 2.0], but got ", .after = "."},
    {.name = "frequency_penalty", .interfaces = kLikeVllm, .type = Type::kNumber, .low = -2, .high = 2,
     .before = "Parameter frequency_penalty should be in [-2.0, 2.0], got ", .after = "."},
    {.name = "frequency_penalty", .interfaces = kTgi, .type = Type::kNumber, .low = -2, .high = 2,
     .before = "Parameter frequency_penalty should be in [-2.0, 2.0], got ", .after = ".",
     .about = "as text-generation-inference has it"},
    {.name = "do_sample", .interfaces = kLikeTgi, .type = Type::kBoolean, .about = "false: greedy"},
    {.name = "seed", .interfaces = kAll & ~kMessages, .type = Type::kInteger, .low = 0, .high = kInt64Max,
     .before = "Parameter seed must be in [0, 9223372036854775807], got ", .after = ".",
     .type_word = "unsigned", .about = "the same tokens at any load"},
    {.name = "watermark", .interfaces = kLikeTgi, .type = Type::kBoolean, .about = "accepted, without effect"},
    {.name = "stop", .interfaces = kLikeVllm | kTgi, .type = Type::kOther, .schema = kStopSchema},
    {.name = "stop_sequences", .interfaces = kMessages, .type = Type::kOther,
     .schema = R"({"type":"array","items":{"type":"string","minLength":1}})"},
    {.name = "stop_token_ids", .interfaces = kLikeVllm, .type = Type::kOther,
     .schema = R"({"type":"array","items":{"type":"integer"}})"},
    {.name = "include_stop_str_in_output", .interfaces = kLikeVllm, .type = Type::kBoolean},
    {.name = "skip_special_tokens", .interfaces = kLikeVllm, .type = Type::kBoolean},
    {.name = "ignore_eos", .interfaces = kLikeVllm, .type = Type::kBoolean},
    {.name = "n", .interfaces = kLikeVllm, .type = Type::kInteger, .low = 1, .high = 8192,
     .before = "Parameter [n] should be in [1, 8192], got ", .after = ". ", .type_word = "unsigned"},
    {.name = "best_of", .interfaces = kLikeVllm, .type = Type::kInteger, .low = 1, .high = 128,
     .before = "Parameter [best_of] should be in [1, 128], got ", .after = ".", .type_word = "unsigned"},
    {.name = "use_beam_search", .interfaces = kLikeVllm, .type = Type::kBoolean},
    {.name = "length_penalty", .interfaces = kOpenAi, .type = Type::kNumber, .low = -10, .high = 10,
     .before = "Parameter length_penalty must be in [-10.0,10.0], got ", .after = ".",
     .about = "of beam search; 1 by default"},
    {.name = "logprobs", .interfaces = kChat, .type = Type::kBoolean},
    {.name = "logprobs", .interfaces = kCompletions, .type = Type::kInteger, .low = 0, .high = 5,
     .before = "logprobs should be in range [0, 5], got ", .after = ".", .type_word = "unsigned"},
    {.name = "top_logprobs", .interfaces = kChat, .type = Type::kInteger, .low = 0, .high = 20,
     .before = "Parameter top logprobs must be in [0, 20], got ", .after = ".", .type_word = "unsigned"},
    {.name = "prompt_logprobs", .interfaces = kOpenAi, .type = Type::kInteger, .low = 0, .high = 20,
     .before = "Parameter prompt_logprobs must be in [0, 20], got ", .after = ".", .type_word = "unsigned"},
    {.name = "echo", .interfaces = kCompletions, .type = Type::kBoolean},
    {.name = "stream", .interfaces = kLikeVllm | kMessages | kResponses, .type = Type::kBoolean,
     .type_message = "stream must be boolean type."},
    {.name = "priority", .interfaces = kNative | kTritonText | kTritonTokens | kLikeVllm, .type = Type::kInteger, .low = 1, .high = 5,
     .before = "Parameter priority must be in [1,5], got ", .after = ".", .type_word = "unsigned",
     .about = "1 is first; 5 by default"},
    {.name = "timeout", .interfaces = kNative | kTritonText | kTritonTokens | kLikeVllm, .type = Type::kInteger, .low = 1, .high = 65535,
     .before = "Parameter timeout must be strictly positive and small than 65535 seconds, got ", .after = ".",
     .type_word = "unsigned", .about = "seconds"},
    {.name = "details", .interfaces = kLikeTgi, .type = Type::kBoolean},
    {.name = "perf_stat", .interfaces = kTritonText, .type = Type::kBoolean, .about = "accepted, without effect"},
    {.name = "batch_size", .interfaces = kTritonText | kTritonTokens, .type = Type::kInteger, .low = 1, .high = kInt32Max,
     .before = "Parameter batch_size must be in (0,2147483647], got ", .after = ".",
     .about = "accepted, without effect"},
    {.name = "decoder_input_details", .interfaces = kTgi, .type = Type::kBoolean},
    {.name = "return_full_text", .interfaces = kTgi, .type = Type::kBoolean},
    {.name = "truncate", .interfaces = kTgi, .type = Type::kInteger, .low = 1, .high = kInt32Max,
     .before = "truncate must be in (0,2147483647], got ", .after = ".", .about = "keeps the last N prompt tokens"},
    {.name = "adapter_id", .interfaces = kTgi, .type = Type::kString},
    {.name = "logit_bias", .interfaces = kLikeVllm, .type = Type::kOther,
     .schema = R"({"type":"object","additionalProperties":{"type":"number","minimum":-100,"maximum":100}})",
     .about = "token id to what is added to its logit"},
    {.name = "stream_options", .interfaces = kOpenAi, .type = Type::kOther,
     .schema = R"({"type":"object","properties":{"include_usage":{"type":"boolean"},"continuous_usage_stats":{"type":"boolean"}}})"},
    {.name = "response_format", .interfaces = kLikeVllm, .type = Type::kOther, .schema = kGuidedSchema},
    {.name = "guided_json", .interfaces = kLikeVllm, .type = Type::kOther,
     .schema = R"({"oneOf":[{"type":"object"},{"type":"string"}]})"},
    {.name = "guided_regex", .interfaces = kLikeVllm, .type = Type::kString},
    {.name = "guided_choice", .interfaces = kLikeVllm, .type = Type::kOther,
     .schema = R"({"type":"array","items":{"type":"string"},"minItems":1})"},
    {.name = "guided_grammar", .interfaces = kLikeVllm, .type = Type::kString, .about = "Lark"},
    {.name = "structured_outputs", .interfaces = kLikeVllm, .type = Type::kOther, .schema = R"({"type":"object"})",
     .about = "one of json, json_object, regex, choice, grammar"},
    {.name = "grammar", .interfaces = kTgi, .type = Type::kOther,
     .schema = R"({"type":"object","properties":{"type":{"type":"string"}},"required":["type","value"]})",
     .about = "type json or regex, and its value"},
};

[[noreturn]] void wrong_type(const FieldRule& rule, const char* word) {
  if (rule.type_message != nullptr) throw Refused(std::string(rule.type_message));
  throw Refused(fmt::format("{} must be {} type.", rule.name,
                            rule.type_word != nullptr ? rule.type_word : word));
}

[[noreturn]] void out_of_range(const FieldRule& rule, const nlohmann::json& value) {
  throw Refused(fmt::format("{}{}{}", rule.before, value.dump(), rule.after));
}

int64_t read_integer(const FieldRule& rule, const nlohmann::json& value) {
  if (!value.is_number_integer()) wrong_type(rule, "integer");
  constexpr auto kMax = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  if (value.is_number_unsigned() && value.get<uint64_t>() > kMax) out_of_range(rule, value);
  const auto number = value.get<int64_t>();
  const bool above = rule.high < kInt64Max && number > static_cast<int64_t>(rule.high);
  if (number < static_cast<int64_t>(rule.low) || above || (rule.not_zero && number == 0))
    out_of_range(rule, value);
  return number;
}

double read_number(const FieldRule& rule, const nlohmann::json& value) {
  if (!value.is_number()) wrong_type(rule, "float");
  const auto number = value.get<double>();
  const bool fits = (rule.open_low ? number > rule.low : number >= rule.low) &&
                    (rule.open_high ? number < rule.high : number <= rule.high);
  if (!fits) out_of_range(rule, value);
  return number;
}

template <typename T>
std::optional<T> find(const std::map<std::string, T>& map, const std::string& name) {
  const auto it = map.find(name);
  if (it == map.end()) return std::nullopt;
  return it->second;
}

}  // namespace

std::span<const FieldRule> field_rules() { return kRules; }

FieldValues FieldValues::read(Fields& fields, Interface interface) {
  FieldValues values;
  for (const FieldRule& rule : kRules) {
    if ((rule.interfaces & interface) == 0 || rule.type == Type::kOther) continue;
    const nlohmann::json* value = fields.find(rule.name);
    if (value == nullptr) continue;
    switch (rule.type) {
      case Type::kInteger:
        values.integers_[rule.name] = read_integer(rule, *value);
        break;
      case Type::kNumber:
        values.numbers_[rule.name] = read_number(rule, *value);
        break;
      case Type::kBoolean:
        if (!value->is_boolean()) wrong_type(rule, "boolean");
        values.booleans_[rule.name] = value->get<bool>();
        break;
      case Type::kString:
        if (!value->is_string()) wrong_type(rule, "string");
        values.strings_[rule.name] = value->get<std::string>();
        break;
      case Type::kOther:
        break;
    }
  }
  return values;
}

std::optional<int64_t> FieldValues::integer(const std::string& name) const { return find(integers_, name); }
std::optional<double> FieldValues::number(const std::string& name) const { return find(numbers_, name); }
std::optional<bool> FieldValues::boolean(const std::string& name) const { return find(booleans_, name); }
std::optional<std::string> FieldValues::string(const std::string& name) const { return find(strings_, name); }

}  // namespace phalanx::api
