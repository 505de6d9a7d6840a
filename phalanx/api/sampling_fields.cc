#include "phalanx/api/sampling_fields.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>

#include "phalanx/api/refusal.h"

namespace phalanx::api {
namespace {

using nlohmann::json;

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();
constexpr int64_t kInt64Max = std::numeric_limits<int64_t>::max();
constexpr int64_t kStopUnits = 32768;
constexpr int64_t kStopItemUnits = 1024;
constexpr int32_t kTopKCap = 1000;

void read_max_tokens(Fields& fields, const ServiceOptions& options, engine::SamplingParams* out) {
  int64_t max_tokens = options.max_output_tokens;
  // The newer name wins, as at OpenAI.
  for (const char* key : {"max_tokens", "max_completion_tokens"}) {
    const std::string type = fmt::format("Parameter {} not number_integer", key);
    const std::string range = fmt::format("Parameter {} must be (0,2147483647], got ", key);
    if (const auto value = fields.integer(
            key, {.low = 1, .high = kInt32Max, .before = range, .type_message = type}))
      max_tokens = *value;
  }
  out->max_tokens = static_cast<int32_t>(std::min(max_tokens, options.max_output_tokens));
  const std::string range = fmt::format("Parameter min_tokens must be in [0,{}], got ",
                                        out->max_tokens);
  out->min_tokens = static_cast<int32_t>(
      fields.integer("min_tokens", {.low = 0, .high = out->max_tokens, .before = range, .after = "."})
          .value_or(0));
}

// Says whether temperature makes the choice greedy.
void read_distribution(Fields& fields, const ServiceOptions& options, engine::SamplingParams* out) {
  const GenerationDefaults& defaults = options.defaults;
  const auto temperature = fields.number_where(
      "temperature",
      [](double v) { return v >= 0 && v <= std::numeric_limits<float>::max(); },
      "Parameter temperature must be in (0.0,3.40282e+38], got ");
  const auto top_k = fields.integer(
      "top_k", {.low = -1, .high = kInt32Max,
                .before = "Parameter top_k must be in -1 || (0,2147483647], got "});
  if (top_k == 0) throw Refused("Parameter top_k must be in -1 || (0,2147483647], got 0");
  const auto top_p = fields.number_where("top_p", [](double v) { return v > 0 && v <= 1; },
                                         "Parameter top_p must be in (0.0,1.0], got ");
  const auto min_p = fields.number_where("min_p", [](double v) { return v >= 0 && v <= 1; },
                                         "Parameter min_p must be in [0.0,1.0], got ");
  const auto repetition = fields.number_where(
      "repetition_penalty", [](double v) { return v > 0 && v <= 2; },
      "Parameter 'repetition_penalty' must be in (0.0, 2.0], got ");
  const auto presence = fields.number_where(
      "presence_penalty", [](double v) { return v >= -2 && v <= 2; },
      "Parameter presence_penalty not in [-2.0, 2.0], but got ");
  const auto frequency = fields.number_where(
      "frequency_penalty", [](double v) { return v >= -2 && v <= 2; },
      "Parameter frequency_penalty should be in [-2.0, 2.0], got ");
  const auto seed = fields.integer(
      "seed", {.low = 0, .high = kInt64Max, .type = "unsigned",
               .before = "Parameter seed must be in [0, 9223372036854775807], got ", .after = "."});

  // Unset: the model's own temperature, and greedy where it has none.
  out->temperature = temperature ? static_cast<float>(*temperature)
                     : defaults.do_sample ? defaults.temperature.value_or(0.0f)
                                          : 0.0f;
  out->top_p = top_p ? static_cast<float>(*top_p) : defaults.top_p.value_or(1.0f);
  out->min_p = static_cast<float>(min_p.value_or(0));
  out->repetition_penalty =
      repetition ? static_cast<float>(*repetition) : defaults.repetition_penalty.value_or(1.0f);
  out->presence_penalty = static_cast<float>(presence.value_or(0));
  out->frequency_penalty = static_cast<float>(frequency.value_or(0));
  if (seed) out->seed = static_cast<uint64_t>(*seed);

  const bool model_caps = defaults.top_k && *defaults.top_k > 0;
  int64_t cap = model_caps ? *defaults.top_k : kTopKCap;
  if (options.vocab_size > 0) cap = std::min(cap, options.vocab_size);
  if (top_k)
    out->top_k = *top_k < 0 ? -1 : static_cast<int32_t>(std::min(*top_k, cap));
  else
    out->top_k = model_caps ? static_cast<int32_t>(cap) : -1;
}

void read_stops(Fields& fields, SamplingFields* out) {
  constexpr const char* kList =
      "Input validation error: `stop` must be list[string] if list, and item length in [1, 1024] with "
      "total <= 32768";
  const json* stop = fields.find("stop");
  if (stop != nullptr && stop->is_string()) {
    const auto& text = stop->get_ref<const std::string&>();
    const int64_t units = utf16_units(text);
    if (units < 1 || units > kStopUnits)
      throw Refused(fmt::format(
          "Input validation error: length of `stop` must be in [1, {}], but got {}", kStopUnits, units));
    out->stops.push_back(text);
  } else if (stop != nullptr && stop->is_array()) {
    int64_t total = 0;
    for (const auto& item : *stop) {
      if (!item.is_string()) throw Refused(kList);
      const auto& text = item.get_ref<const std::string&>();
      const int64_t units = utf16_units(text);
      total += units;
      if (units < 1 || units > kStopItemUnits || total > kStopUnits) throw Refused(kList);
      out->stops.push_back(text);
    }
  } else if (stop != nullptr) {
    throw Refused("Input validation error: param stop must be string or list[string]");
  }

  const json* ids = fields.find("stop_token_ids");
  if (ids != nullptr) {
    if (!ids->is_array()) throw Refused("Parameter stop_token_ids not array");
    for (const auto& id : *ids) {
      if (!id.is_number_integer()) throw Refused("Parameter stop_token_ids not list[int]");
      const auto value = id.is_number_unsigned() && id.get<uint64_t>() > uint64_t{kInt32Max}
                             ? -1
                             : id.get<int64_t>();
      if (value >= 0 && value <= kInt32Max)
        out->sampling.stop_token_ids.push_back(static_cast<int32_t>(value));
    }
  }
  if (stop != nullptr || ids != nullptr)
    out->include_stop = fields.boolean("include_stop_str_in_output").value_or(false);
  else
    (void)fields.find("include_stop_str_in_output");
}

void read_sequences(Fields& fields, const ServiceOptions& options, SamplingFields* out) {
  const auto n = fields.integer("n", {.low = 1, .high = 8192, .type = "unsigned",
                                      .before = "Parameter [n] should be in [1, 8192], got ",
                                      .after = ". "});
  const auto best_of = fields.integer(
      "best_of", {.low = 1, .high = 128, .type = "unsigned",
                  .before = "Parameter [best_of] should be in [1, 128], got ", .after = "."});
  if (fields.boolean("use_beam_search").value_or(false))
    throw Refused("use_beam_search is not supported by this endpoint");
  const std::pair<const char*, int64_t> limits[] = {{"max_batch_size", options.max_batch},
                                                    {"maxPrefillBatchSize", options.max_prefill_batch},
                                                    {"maxN", options.max_n}};
  for (const auto& [name, limit] : limits) {
    if (n.value_or(1) > limit)
      throw Refused(fmt::format("The n parameter ({}) exceeds '{}' ({}). Please reduce n or increase "
                                "'{}' in config.json of mindie-service.",
                                *n, name, limit, name));
  }
  if (best_of && out->stream && *best_of != n.value_or(1))
    throw Refused(fmt::format("best_of must be equal to n in stream mode, but best_of is {}, n is {}.",
                              *best_of, n ? std::to_string(*n) : "None"));
  if (best_of && !out->stream && *best_of < n.value_or(1))
    throw Refused(fmt::format("best_of must be greater than or equal to n, but best_of is {}, n is {}.",
                              *best_of, n.value_or(1)));
  out->sequences = static_cast<int>(best_of.value_or(n.value_or(1)));
  if (out->sequences > 1 && out->sampling.temperature == 0)
    throw Refused(fmt::format("best_of/n can not greater than 1 without using beam search when "
                              "temperature is 0 or not set, but best_of is {}, n is {}.",
                              out->sequences, n.value_or(1)));
}

void read_logprobs(Fields& fields, OpenAiDialect dialect, SamplingFields* out) {
  if (dialect == OpenAiDialect::kCompletions) {
    const auto count = fields.integer("logprobs", {.low = 0, .high = 5, .type = "unsigned",
                                                   .before = "logprobs should be in range [0, 5], got ",
                                                   .after = "."});
    out->logprobs = count.has_value();
    out->sampling.logprobs = static_cast<int32_t>(count.value_or(-1));
    return;
  }
  const auto wanted = fields.boolean("logprobs");
  const auto top = fields.integer(
      "top_logprobs", {.low = 0, .high = 20, .type = "unsigned",
                       .before = "Parameter top logprobs must be in [0, 20], got ", .after = "."});
  if (top && wanted && !*wanted)
    throw Refused(
        "Value error, when using top_logprobs, logprobs must be true or null in chat completions");
  out->logprobs = wanted.value_or(top.has_value());
  out->sampling.logprobs = out->logprobs ? static_cast<int32_t>(top.value_or(0)) : -1;
}

void read_stream(Fields& fields, SamplingFields* out) {
  const json* stream = fields.find("stream");
  if (stream != nullptr && !stream->is_boolean()) throw Refused("stream must be boolean type.");
  out->stream = stream != nullptr && stream->get<bool>();
  const json* options = fields.find("stream_options");
  if (options == nullptr) return;
  if (!options->is_object()) throw Refused("stream_options must be object type.");
  Fields inner(*options);
  out->include_usage = inner.boolean("include_usage").value_or(false);
}

}  // namespace

SamplingFields read_sampling(Fields& fields, OpenAiDialect dialect, const ServiceOptions& options) {
  SamplingFields out;
  read_max_tokens(fields, options, &out.sampling);
  read_distribution(fields, options, &out.sampling);
  read_stream(fields, &out);
  read_stops(fields, &out);
  out.skip_special = fields.boolean("skip_special_tokens").value_or(true);
  out.ignore_eos = fields.boolean("ignore_eos").value_or(false);
  read_sequences(fields, options, &out);
  read_logprobs(fields, dialect, &out);
  return out;
}

void check_model(Fields& fields, const ServiceOptions& options, const std::string& unknown) {
  const json* model = fields.find("model");
  if (model == nullptr) throw Refused("Request contains not model or model null");
  if (!model->is_string()) throw Refused("Request param model must be string");
  const auto& name = model->get_ref<const std::string&>();
  if (name.empty()) throw Refused("Request param model must be not empty");
  if (name != options.model_name) throw Refused(unknown);
}

void check_response_format(Fields& fields) {
  const json* format = fields.find("response_format");
  if (format == nullptr) return;
  if (!format->is_object()) throw Refused("Parameter response_format must be an object");
  const auto type = format->find("type");
  if (type == format->end()) throw Refused("Parameter response_format must contain 'type' field");
  if (!type->is_string()) throw Refused("Parameter response_format.type must be a string");
  const auto& name = type->get_ref<const std::string&>();
  if (name == "text") return;
  if (name == "json_object" || name == "json_schema")
    throw Refused(fmt::format("Parameter response_format.type '{}' is not supported by this server; "
                              "only 'text' is",
                              name));
  throw Refused(fmt::format("Parameter response_format.type must be 'json_object', 'json_schema' or "
                            "'text', got '{}'",
                            name));
}

}  // namespace phalanx::api
