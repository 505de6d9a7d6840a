#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "phalanx/api/fields.h"
#include "phalanx/api/openai_answer.h"
#include "phalanx/api/refusal.h"

namespace phalanx::api {
namespace {

using nlohmann::json;

int32_t read_id(const json& value) {
  if (!value.is_number_integer())
    throw Refused("All elements of the prompt array must be integers.");
  const bool fits = value.is_number_unsigned() ? value.get<uint64_t>() <= 2147483647u
                                               : value.get<int64_t>() >= 0;
  return fits ? static_cast<int32_t>(value.get<int64_t>()) : -1;  // check_prompt refuses -1
}

std::vector<int32_t> read_ids(const json& array) {
  if (array.empty()) throw Refused("Prompt array cannot be empty.");
  std::vector<int32_t> ids;
  ids.reserve(array.size());
  for (const auto& value : array) ids.push_back(read_id(value));
  return ids;
}

std::string read_text(const json& value, const ServiceOptions& options) {
  auto text = value.get<std::string>();
  const int64_t units = utf16_units(text);
  const int64_t most = options.max_request_mb * 1024 * 1024;
  if (units < 1 || units > most)
    throw Refused(fmt::format("Prompt len not in (0, {}], but the length of inputs is {}", most, units));
  return text;
}

void read_prompts(Fields& fields, const ServiceOptions& options, CompletionRequest* out) {
  const json* prompt = fields.find("prompt");
  if (prompt == nullptr) throw Refused("Contains not prompt or prompt null");
  if (prompt->is_string()) {
    out->prompts.emplace_back(read_text(*prompt, options));
    return;
  }
  if (!prompt->is_array())
    throw Refused("The type of prompt is abnormal,prompt must be str or integer list.");
  if (prompt->empty()) throw Refused("Prompt array cannot be empty.");
  if (!prompt->front().is_string() && !prompt->front().is_array()) {
    out->prompts.emplace_back(read_ids(*prompt));
    return;
  }
  // Several prompts, all of one kind.
  for (const auto& one : *prompt) {
    if (one.type() != prompt->front().type())
      throw Refused("The type of prompt is abnormal,prompt must be str or integer list.");
    if (one.is_string())
      out->prompts.emplace_back(read_text(one, options));
    else
      out->prompts.emplace_back(read_ids(one));
  }
}

class CompletionAnswer final : public OpenAiAnswer {
 public:
  explicit CompletionAnswer(AnswerContext context) : OpenAiAnswer(std::move(context)) {
    offsets_.resize(static_cast<size_t>(context_.choices));
    echoed_.resize(offsets_.size());
    for (size_t i = 0; i < offsets_.size(); ++i)
      if (const std::string* prompt = echo_of(i); prompt != nullptr && context_.echo_ids.empty())
        offsets_[i] = characters(*prompt);
  }

 protected:
  const char* object(bool) const override { return "text_completion"; }
  void open_choice(int) override {}

  std::vector<OrderedJson> stream_choices(const Piece& piece) override {
    const auto index = static_cast<size_t>(piece.choice);
    const std::string* echo = echoed_[index] ? nullptr : echo_of(index);
    echoed_[index] = true;
    OrderedJson json;
    json["index"] = piece.choice;
    json["text"] = echo != nullptr ? *echo + piece.text : piece.text;
    json["logprobs"] = nullptr;
    if (context_.logprobs >= 0 && (!piece.tokens.empty() || !piece.prompt.empty()))
      json["logprobs"] = logprobs_json(index, piece.prompt, piece.tokens, &offsets_[index]);
    if (context_.prompt_logprobs && !piece.prompt.empty())
      json["prompt_logprobs"] = prompt_logprobs_json(piece.prompt, *context_.text);
    json["stop_reason"] = stop_json(piece.stop_reason);
    json["finish_reason"] = finish_json(piece.finish);
    return {std::move(json)};
  }

  OrderedJson whole_choice(int index, const Choice& choice) override {
    const std::string* echo = echo_of(static_cast<size_t>(index));
    OrderedJson json;
    json["index"] = index;
    json["text"] = echo != nullptr ? *echo + choice.text : choice.text;
    size_t offset = echo != nullptr && context_.echo_ids.empty() ? characters(*echo) : 0;
    json["logprobs"] = nullptr;
    if (context_.logprobs >= 0)
      json["logprobs"] = logprobs_json(static_cast<size_t>(index), choice.prompt, choice.tokens, &offset);
    if (context_.prompt_logprobs)
      json["prompt_logprobs"] = prompt_logprobs_json(choice.prompt, *context_.text);
    json["stop_reason"] = stop_json(choice.stop_reason);
    json["finish_reason"] = finish_json(choice.finish);
    return json;
  }

 private:
  [[nodiscard]] const std::string* echo_of(size_t choice) const {
    return context_.echo.empty() ? nullptr
                                 : &context_.echo[choice / static_cast<size_t>(context_.sequences)];
  }

  static OrderedJson stop_json(const decltype(Piece::stop_reason)& reason) {
    if (const auto* text = std::get_if<std::string>(&reason)) return *text;
    if (const auto* id = std::get_if<int32_t>(&reason)) return *id;
    return nullptr;
  }

  static size_t characters(std::string_view text) {
    size_t count = 0;
    for (const char c : text) count += (static_cast<unsigned char>(c) & 0xC0) != 0x80;
    return count;
  }

  // `offset` counts characters of the text before the first token and is moved on. With echo the
  // prompt's tokens come first; its first has no log-probability.
  OrderedJson logprobs_json(size_t choice, const std::vector<engine::PromptLogprob>& prompt,
                            const std::vector<TokenPiece>& tokens, size_t* offset) const {
    OrderedJson json;
    for (const char* key : {"text_offset", "token_logprobs", "tokens", "top_logprobs"})
      json[key] = OrderedJson::array();
    const auto add = [&](int32_t id, const OrderedJson& logprob, const auto& tops) {
      const std::string text = context_.text->token_text(id);
      json["text_offset"].push_back(*offset);
      *offset += characters(text);
      json["token_logprobs"].push_back(logprob);
      json["tokens"].push_back(text);
      OrderedJson top = nullptr;
      if (!logprob.is_null()) top = OrderedJson{{text, logprob}};
      for (const auto& [other, value] : tops) {
        const std::string name = context_.text->token_text(other);
        if (!top.contains(name)) top[name] = value;
      }
      json["top_logprobs"].push_back(std::move(top));
    };
    // In the stream the prompt comes with the first piece alone.
    const size_t own = choice / static_cast<size_t>(context_.sequences);
    const bool echoes = own < context_.echo_ids.size() &&
                        (!prompt.empty() || (*offset == 0 && context_.echo_ids[own].size() == 1));
    if (echoes) {
      add(context_.echo_ids[own].front(), nullptr, std::vector<TopToken>());
      for (const engine::PromptLogprob& token : prompt) add(token.token, token.logprob, token.top);
    }
    for (const TokenPiece& token : tokens) add(token.id, token.logprob, token.top);
    return json;
  }

  std::vector<size_t> offsets_;  // by choice, when streaming
  std::vector<bool> echoed_;
};

}  // namespace

CompletionRequest parse_completion(std::string_view body, const ServiceOptions& options) {
  const json request = parse_body(body, options.max_json_depth);
  Fields fields(request);
  CompletionRequest out;
  check_model(fields, options, "Not found given model, please check modelName in config.file.");
  read_prompts(fields, options, &out);
  out.fields = read_sampling(fields, kCompletions, options, body);
  const auto choices = static_cast<int64_t>(out.prompts.size()) * out.fields.sequences;
  if (choices > options.max_batch)
    throw Refused(fmt::format("The request asks for {} answers ({} prompts, {} each), more than "
                              "maxBatchSize {}",
                              choices, out.prompts.size(), out.fields.sequences, options.max_batch));
  out.echo = out.fields.echo;
  if (out.echo && out.fields.logprobs && out.fields.beam_search)
    throw Refused("echo with logprobs cannot be used with beam search");
  if (const json* suffix = fields.find("suffix"); suffix != nullptr && *suffix != "")
    throw Refused("suffix is not supported by this endpoint");
  out.ignored = out.fields.ignored;
  const auto unread = fields.unread();
  out.ignored.insert(out.ignored.end(), unread.begin(), unread.end());
  return out;
}

std::unique_ptr<Answer> make_completion_answer(AnswerContext context) {
  return std::make_unique<CompletionAnswer>(std::move(context));
}

}  // namespace phalanx::api
