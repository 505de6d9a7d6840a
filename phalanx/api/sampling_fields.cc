#include "phalanx/api/sampling_fields.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "phalanx/api/refusal.h"
#include "phalanx/api/structure_fields.h"

namespace phalanx::api {
namespace {

using nlohmann::json;

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();
constexpr int64_t kStopUnits = 32768;
constexpr int64_t kTgiStopUnits = 1024;
constexpr int64_t kStopItemUnits = 1024;
constexpr size_t kTgiStops = 1024;
constexpr int32_t kTopKCap = 1000;
constexpr int64_t kMaxNewTokens = 20;  // where max_new_tokens is not given
constexpr int64_t kBeamTokens = 128;
constexpr size_t kMaxBiases = 1024;
constexpr unsigned kLikeVllm = kChat | kCompletions | kVllm;
constexpr unsigned kLikeTgi = kTgi | kNative | kTritonText | kTritonTokens;

void read_max_tokens(const FieldValues& values, Interface interface, const ServiceOptions& options,
                     engine::SamplingParams* out) {
  int64_t max_tokens = (interface & kLikeTgi) != 0 ? kMaxNewTokens : options.max_output_tokens;
  // The newer name wins, as at OpenAI.
  for (const char* key : {"max_tokens", "max_completion_tokens", "max_new_tokens", "max_output_tokens"})
    max_tokens = values.integer(key).value_or(max_tokens);
  out->max_tokens = static_cast<int32_t>(std::min(max_tokens, options.max_output_tokens));
  const int64_t least = values.integer("min_tokens").value_or(0);
  if (least > out->max_tokens)
    throw Refused(fmt::format("Parameter min_tokens must be in [0,{}], got {}.", out->max_tokens, least));
  out->min_tokens = static_cast<int32_t>(least);
}

void read_distribution(const FieldValues& values, const ServiceOptions& options,
                       engine::SamplingParams* out) {
  const GenerationDefaults& defaults = options.defaults;
  // Unset: the model's own temperature, and greedy where it has none.
  const auto temperature = values.number("temperature");
  out->temperature = temperature ? static_cast<float>(*temperature)
                     : defaults.do_sample ? defaults.temperature.value_or(0.0f)
                                          : 0.0f;
  // TGI's do_sample: false is greedy whatever else is said, true samples at temperature 1 if none is
  // known.
  const auto do_sample = values.boolean("do_sample");
  if (do_sample == false) out->temperature = 0;
  if (do_sample == true && !temperature) out->temperature = defaults.temperature.value_or(1.0f);
  out->top_p = static_cast<float>(values.number("top_p").value_or(defaults.top_p.value_or(1.0f)));
  out->min_p = static_cast<float>(values.number("min_p").value_or(0));
  out->repetition_penalty = static_cast<float>(
      values.number("repetition_penalty").value_or(defaults.repetition_penalty.value_or(1.0f)));
  out->presence_penalty = static_cast<float>(values.number("presence_penalty").value_or(0));
  out->frequency_penalty = static_cast<float>(values.number("frequency_penalty").value_or(0));
  if (const auto seed = values.integer("seed")) out->seed = static_cast<uint64_t>(*seed);

  const bool model_caps = defaults.top_k && *defaults.top_k > 0;
  int64_t cap = model_caps ? *defaults.top_k : kTopKCap;
  if (options.vocab_size > 0) cap = std::min(cap, options.vocab_size);
  const auto top_k = values.integer("top_k");
  if (top_k)
    out->top_k = *top_k <= 0 ? -1 : static_cast<int32_t>(std::min(*top_k, cap));
  else
    out->top_k = model_caps ? static_cast<int32_t>(cap) : -1;
}

void read_stop_strings(Fields& fields, const char* key, bool tgi, SamplingFields* out) {
  constexpr const char* kList =
      "Input validation error: `stop` must be list[string] if list, and item length in [1, 1024] with "
      "total <= 32768";
  const json* stop = fields.find(key);
  if (stop == nullptr) return;
  if (stop->is_string()) {
    const auto& text = stop->get_ref<const std::string&>();
    const int64_t units = utf16_units(text);
    const int64_t most = tgi ? kTgiStopUnits : kStopUnits;
    if (units < 1 || units > most)
      throw Refused(fmt::format(
          "Input validation error: length of `stop` must be in [1, {}], but got {}", most, units));
    out->stops.push_back(text);
    return;
  }
  if (!stop->is_array())
    throw Refused("Input validation error: param stop must be string or list[string]");
  if (tgi && stop->size() > kTgiStops) throw Refused(kList);
  int64_t total = 0;
  for (const auto& item : *stop) {
    if (!item.is_string()) throw Refused(kList);
    const auto& text = item.get_ref<const std::string&>();
    const int64_t units = utf16_units(text);
    total += units;
    if (units < 1 || units > kStopItemUnits || total > kStopUnits) throw Refused(kList);
    out->stops.push_back(text);
  }
}

void read_stops(Fields& fields, Interface interface, const FieldValues& values, SamplingFields* out) {
  if (interface == kMessages) return read_stop_strings(fields, "stop_sequences", false, out);
  if ((interface & (kLikeVllm | kTgi)) == 0) return;
  read_stop_strings(fields, "stop", interface == kTgi, out);
  if (interface == kTgi) return;
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
  if (!out->stops.empty() || ids != nullptr)
    out->include_stop = values.boolean("include_stop_str_in_output").value_or(false);
}

void read_beams(const FieldValues& values, const ServiceOptions& options, Interface interface,
                SamplingFields* out) {
  if (interface == kVllm) throw Refused("use_beam_search is not supported by this endpoint");
  out->beam_search = true;
  out->length_penalty = values.number("length_penalty").value_or(1);
  const auto max_tokens = values.integer("max_completion_tokens");
  if (max_tokens.value_or(values.integer("max_tokens").value_or(options.max_output_tokens)) > kBeamTokens)
    throw Refused("Please set the max_tokens to be not larger than 128 when the use_beam_search is on.");
  if (out->sampling.temperature != 0 && values.number("temperature"))
    throw Refused("Parameter temperature must be 0 or unset when use_beam_search is on: beams are "
                  "chosen by probability, not drawn");
  out->sampling.temperature = 0;
  for (const char* name : {"repetition_penalty", "presence_penalty", "frequency_penalty", "min_p"}) {
    const auto value = values.number(name);
    if (value && *value != (std::string_view(name) == "repetition_penalty" ? 1.0 : 0.0))
      throw Refused(fmt::format("use_beam_search cannot be combined with {}", name));
  }
  out->sampling.repetition_penalty = 1;
}

void read_sequences(const FieldValues& values, const ServiceOptions& options, Interface interface,
                    SamplingFields* out) {
  const auto n = values.integer("n");
  const auto best_of = values.integer("best_of");
  const std::pair<const char*, int64_t> limits[] = {{"max_batch_size", options.max_batch},
                                                    {"maxPrefillBatchSize", options.max_prefill_batch},
                                                    {"maxN", options.max_n}};
  for (const auto& [name, limit] : limits) {
    if (n.value_or(1) > limit)
      throw Refused(fmt::format("The n parameter ({}) exceeds '{}' ({}). Please reduce n or increase "
                                "'{}' in config.json of mindie-service.",
                                *n, name, limit, name));
    if (best_of.value_or(1) > limit)
      throw Refused(fmt::format("The best_of parameter ({}) exceeds '{}' ({}). Please reduce best_of or "
                                "increase '{}' in config.json of mindie-service.",
                                *best_of, name, limit, name));
  }
  if (best_of && out->stream && interface != kVllm && *best_of != n.value_or(1))
    throw Refused(fmt::format("best_of must be equal to n in stream mode, but best_of is {}, n is {}.",
                              *best_of, n ? std::to_string(*n) : "None"));
  if (best_of && *best_of < n.value_or(1))
    throw Refused(fmt::format("best_of must be greater than or equal to n, but best_of is {}, n is {}.",
                              *best_of, n.value_or(1)));
  if (values.boolean("use_beam_search").value_or(false)) {
    read_beams(values, options, interface, out);
    out->sequences = static_cast<int>(n.value_or(1));
    out->beam_width = static_cast<int>(best_of.value_or(n.value_or(1)));
    return;
  }
  if (values.number("length_penalty")) out->ignored.push_back("length_penalty");
  out->sequences = static_cast<int>(best_of.value_or(n.value_or(1)));
  if (out->sequences > 1 && out->sampling.temperature == 0)
    throw Refused(fmt::format("best_of/n can not greater than 1 without using beam search when "
                              "temperature is 0 or not set, but best_of is {}, n is {}.",
                              out->sequences, n.value_or(1)));
}

void read_logprobs(const FieldValues& values, Interface interface, SamplingFields* out) {
  if (interface == kCompletions) {
    const auto count = values.integer("logprobs");
    out->logprobs = count.has_value();
    out->sampling.logprobs = static_cast<int32_t>(count.value_or(-1));
  } else if (interface == kChat) {
    const auto wanted = values.boolean("logprobs");
    const auto top = values.integer("top_logprobs");
    if (top && wanted && !*wanted)
      throw Refused(
          "Value error, when using top_logprobs, logprobs must be true or null in chat completions");
    out->logprobs = wanted.value_or(top.has_value());
    out->sampling.logprobs = out->logprobs ? static_cast<int32_t>(top.value_or(0)) : -1;
  }
  if (const auto count = values.integer("prompt_logprobs")) {
    if (out->beam_search) throw Refused("prompt_logprobs cannot be used with beam search");
    out->sampling.prompt_logprobs = static_cast<int32_t>(*count);
  }
}

void read_stream_options(Fields& fields, SamplingFields* out) {
  const json* options = fields.find("stream_options");
  if (options == nullptr) return;
  if (!options->is_object()) throw Refused("stream_options must be object type.");
  if (!out->stream) throw Refused("Parameter stream_options needs stream to be true");
  Fields inner(*options);
  out->include_usage = inner.boolean("include_usage").value_or(false);
  out->continuous_usage = inner.boolean("continuous_usage_stats").value_or(false);
  for (const std::string& name : inner.unread()) out->ignored.push_back("stream_options." + name);
}

void read_logit_bias(Fields& fields, const ServiceOptions& options, engine::SamplingParams* out) {
  const json* bias = fields.find("logit_bias");
  if (bias == nullptr) return;
  if (!bias->is_object()) throw Refused("logit_bias must be object type.");
  if (bias->size() > kMaxBiases)
    throw Refused(fmt::format("Parameter logit_bias has {} entries, at most {} are allowed", bias->size(),
                              kMaxBiases));
  for (const auto& [key, value] : bias->items()) {
    const bool digits = !key.empty() && key.size() <= 10 &&
                        std::all_of(key.begin(), key.end(), [](char c) { return c >= '0' && c <= '9'; });
    const int64_t id = digits ? std::stoll(key) : -1;
    if (id < 0 || id > kInt32Max || (options.vocab_size > 0 && id >= options.vocab_size))
      throw Refused(fmt::format("Parameter logit_bias has the key '{}', expected token ids from 0 to {}",
                                key.substr(0, 32), options.vocab_size - 1));
    if (!value.is_number()) throw Refused(fmt::format("logit_bias.{} must be float type.", key));
    const auto number = value.get<double>();
    if (!(number >= -100 && number <= 100))
      throw Refused(fmt::format("Parameter logit_bias.{} must be in [-100.0, 100.0], got {}.", key,
                                value.dump()));
    out->logit_bias.emplace_back(static_cast<int32_t>(id), static_cast<float>(number));
  }
}

void name_without_effect(const FieldValues& values, SamplingFields* out) {
  for (const char* name : {"watermark", "perf_stat"})
    if (values.boolean(name).value_or(false)) out->ignored.emplace_back(name);
  if (values.integer("batch_size")) out->ignored.emplace_back("batch_size");
  if (values.number("typical_p").value_or(1) < 1) out->ignored.emplace_back("typical_p");
}

// The adapter that the request names; empty: the base model.
std::string read_adapter(Fields& fields, Interface interface, const FieldValues& values,
                         const ServiceOptions& options) {
  if ((interface & (kLikeVllm | kMessages | kResponses)) != 0) {
    const json* model = fields.find("model");  // known, or refused before
    if (model == nullptr || !model->is_string()) return "";
    const auto& name = model->get_ref<const std::string&>();
    return !options.is_model(name) && options.is_adapter(name) ? name : "";
  }
  const auto adapter = values.string("adapter_id");
  if (!adapter || options.is_model(*adapter) || *adapter == "None") return "";
  const bool fits = !adapter->empty() && adapter->size() <= 256 &&
                    std::all_of(adapter->begin(), adapter->end(), [](char c) {
                      return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '.' ||
                             c == '/' || c == '-';
                    });
  if (!fits) throw Refused("The format of adapter_id is invalid.");
  if (!options.is_adapter(*adapter))
    throw Refused(not_found(fmt::format("Adapter {} not found.", *adapter)));
  return *adapter;
}

}  // namespace

SamplingFields read_sampling(Fields& fields, Interface interface, const ServiceOptions& options,
                             std::string_view body, bool stream) {
  SamplingFields out;
  const FieldValues values = FieldValues::read(fields, interface);
  out.stream = values.boolean("stream").value_or(stream);
  read_max_tokens(values, interface, options, &out.sampling);
  read_distribution(values, options, &out.sampling);
  read_stops(fields, interface, values, &out);
  out.skip_special = values.boolean("skip_special_tokens").value_or(true);
  out.ignore_eos = values.boolean("ignore_eos").value_or(false);
  read_sequences(values, options, interface, &out);
  read_logprobs(values, interface, &out);
  out.priority = static_cast<int32_t>(values.integer("priority").value_or(5));
  if (const auto timeout = values.integer("timeout")) out.timeout_s = static_cast<double>(*timeout);
  out.echo = values.boolean("echo").value_or(false);
  out.details = values.boolean("details").value_or(false);
  out.decoder_input_details = values.boolean("decoder_input_details").value_or(false);
  out.return_full_text = values.boolean("return_full_text").value_or(false);
  out.truncate = values.integer("truncate");
  if (out.decoder_input_details && out.stream)
    throw Refused("The decoder_input_details must not be true when stream is true.");
  if ((interface & (kChat | kCompletions)) != 0) read_stream_options(fields, &out);
  if ((interface & kLikeVllm) != 0) {
    read_logit_bias(fields, options, &out.sampling);
    out.grammar = read_structure(fields, body);
  }
  if (interface == kTgi) out.grammar = read_tgi_grammar(fields, body);
  if (out.beam_search && !out.sampling.logit_bias.empty())
    throw Refused("use_beam_search cannot be combined with logit_bias");
  if (out.grammar && out.beam_search)
    throw Refused("use_beam_search cannot be combined with structured output");
  if (out.grammar && out.ignore_eos)
    throw Refused("ignore_eos cannot be combined with structured output, which decides where the text "
                  "ends");
  out.adapter = read_adapter(fields, interface, values, options);
  name_without_effect(values, &out);
  return out;
}

void check_model(Fields& fields, const ServiceOptions& options, const std::string& unknown) {
  const json* model = fields.find("model");
  if (model == nullptr) throw Refused("Request contains not model or model null");
  if (!model->is_string()) throw Refused("Request param model must be string");
  const auto& name = model->get_ref<const std::string&>();
  if (name.empty()) throw Refused("Request param model must be not empty");
  if (!options.is_model(name) && !options.is_adapter(name)) throw Refused(unknown);
}

}  // namespace phalanx::api
