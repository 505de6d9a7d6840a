#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "phalanx/api/inference.h"
#include "phalanx/api/input_fields.h"
#include "phalanx/api/openai_answer.h"
#include "phalanx/api/refusal.h"

// The original's POST /v1/tokenizer (rest-api sheet, chapter 14) and vLLM's /tokenize and /detokenize.
namespace phalanx::api {
namespace {

using nlohmann::json;

void answer(InferenceCall& call, const OrderedJson& body, const std::vector<std::string>& ignored) {
  call.responder->respond({.body = dump(body), .headers = ignored_headers(ignored)});
}

void count_tokens(InferenceCall& call) {
  const ServiceOptions& options = call.core.options;
  json request;
  try {
    request = parse_body(call.request.body, options.max_json_depth);
  } catch (const Refused&) {
    throw Refused("Req body converts to json fail.");
  }
  Fields fields(request);
  const json* inputs = fields.find("inputs");
  if (inputs == nullptr || !inputs->is_string()) throw Refused("Inputs in request body is invalid.");
  const auto& text = inputs->get_ref<const std::string&>();
  const int64_t units = utf16_units(text);
  const int64_t most = options.max_request_mb * 1024 * 1024;
  if (units < 1 || units > most)
    throw Refused(fmt::format("Inputs data length in [0, {}], but the length of inputs is {}", most, units));
  const bool decode = fields.boolean("do_decode").value_or(true);
  const std::vector<int32_t> ids = call.core.text->encode(text, true);
  OrderedJson body{{"token_number", ids.size()}, {"tokens", OrderedJson::array()}};
  for (const int32_t id : ids) {
    if (decode) body["tokens"].push_back(call.core.text->token_text(id));
    else body["tokens"].push_back(id);
  }
  answer(call, body, fields.unread());
}

void tokenize(InferenceCall& call) {
  const ServiceOptions& options = call.core.options;
  const json request = parse_body(call.request.body, options.max_json_depth);
  Fields fields(request);
  if (fields.find("model") != nullptr) check_model(fields, options, "Model not found");
  const json* messages = fields.find("messages");
  const json* prompt = fields.find("prompt");
  if ((messages == nullptr) == (prompt == nullptr))
    throw Refused("Exactly one of prompt and messages is necessary");
  std::vector<int32_t> ids;
  if (prompt != nullptr) {
    if (!prompt->is_string()) throw Refused("prompt must be string type.");
    const bool special = fields.boolean("add_special_tokens").value_or(true);
    ids = call.core.text->encode(prompt->get_ref<const std::string&>(), special);
  } else {
    json chat = request;
    chat["model"] = options.model_name;
    const ChatRequest parsed = parse_chat(chat.dump(), options);
    for (const char* name : {"tools", "tool_choice", "chat_template", "chat_template_kwargs",
                             "add_generation_prompt", "add_special_tokens"})
      (void)fields.find(name);
    ids = prepare_chat(call, parsed.fields, parsed.wishes).spec.prompts.front();
  }
  OrderedJson body{{"count", ids.size()}, {"max_model_len", options.max_sequence}, {"tokens", ids}};
  body["token_strs"] = nullptr;
  if (fields.boolean("return_token_strs").value_or(false)) {
    body["token_strs"] = OrderedJson::array();
    for (const int32_t id : ids) body["token_strs"].push_back(call.core.text->token_text(id));
  }
  answer(call, body, fields.unread());
}

void detokenize(InferenceCall& call) {
  const ServiceOptions& options = call.core.options;
  const json request = parse_body(call.request.body, options.max_json_depth);
  Fields fields(request);
  if (fields.find("model") != nullptr) check_model(fields, options, "Model not found");
  const json* tokens = fields.find("tokens");
  if (tokens == nullptr) throw Refused("Not found tokens.");
  if (tokens->is_array() && tokens->empty()) return answer(call, {{"prompt", ""}}, fields.unread());
  const std::vector<int32_t> ids = read_id_input(*tokens, "tokens");
  answer(call, {{"prompt", call.core.text->decode(ids, false)}}, fields.unread());
}

void embed(InferenceCall& call) {
  const json request = parse_body(call.request.body, call.core.options.max_json_depth);
  throw Refused(
      Refusal{.status = 400,
              .error_type = "Bad Request",
              .error = fmt::format("Model {} is a generative checkpoint ({}), not an embedding model, so it "
                                   "has no embeddings. Use a checkpoint whose config.json says so",
                                   call.core.options.model_name, call.core.options.model_type)});
}

std::string openai_error(int status, const std::string& error, const std::string&) {
  return dump({{"error",
                {{"message", error},
                 {"type", status < 500 ? "invalid_request_error" : "server_error"},
                 {"param", nullptr},
                 {"code", status}}}});
}

}  // namespace

void mount_tokenizer(const std::shared_ptr<Core>& core, Server& server) {
  server.route(kBusiness, "POST", "/v1/tokenizer", inference_handler(core, count_tokens));
  server.route(kBusiness, "POST", "/tokenize", inference_handler(core, tokenize));
  server.route(kBusiness, "POST", "/detokenize", inference_handler(core, detokenize));
  server.route(kBusiness, "POST", "/v1/embeddings", inference_handler(core, embed, openai_error));
}

}  // namespace phalanx::api
