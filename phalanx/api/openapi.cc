#include "phalanx/api/openapi.h"

#include <limits>
#include <nlohmann/json.hpp>

#include "phalanx/api/field_rules.h"
#include "phalanx/api/inference.h"
#include "phalanx/api/openai_answer.h"

namespace phalanx::api {
namespace {

using Type = FieldRule::Type;

OrderedJson rule_schema(const FieldRule& rule) {
  OrderedJson schema;
  switch (rule.type) {
    case Type::kInteger:
      schema["type"] = "integer";
      schema["minimum"] = static_cast<int64_t>(rule.low);
      schema["maximum"] = rule.high >= 9223372036854775807.0 ? std::numeric_limits<int64_t>::max()
                                                              : static_cast<int64_t>(rule.high);
      if (rule.not_zero) schema["not"] = OrderedJson{{"const", 0}};
      break;
    case Type::kNumber:
      schema["type"] = "number";
      schema[rule.open_low ? "exclusiveMinimum" : "minimum"] = rule.low;
      schema[rule.open_high ? "exclusiveMaximum" : "maximum"] = rule.high;
      break;
    case Type::kBoolean:
      schema["type"] = "boolean";
      break;
    case Type::kString:
      schema["type"] = "string";
      break;
    case Type::kOther:
      schema = OrderedJson::parse(rule.schema);
      break;
  }
  if (*rule.about != '\0') schema["description"] = rule.about;
  return schema;
}

// The fields of one interface, from the table that parses them.
OrderedJson fields_of(Interface interface) {
  OrderedJson properties = OrderedJson::object();
  for (const FieldRule& rule : field_rules())
    if ((rule.interfaces & interface) != 0) properties[rule.name] = rule_schema(rule);
  return properties;
}

OrderedJson object(OrderedJson properties, OrderedJson required = OrderedJson::array()) {
  OrderedJson schema{{"type", "object"}, {"properties", std::move(properties)}};
  if (!required.empty()) schema["required"] = std::move(required);
  return schema;
}
OrderedJson text_type() { return {{"type", "string"}, {"minLength", 1}}; }
OrderedJson ids_type() {
  return {{"type", "array"}, {"minItems", 1}, {"items", {{"type", "integer"}, {"minimum", 0}, {"maximum", 1048576}}}};
}
OrderedJson text_part() {
  return object({{"type", {{"const", "text"}}}, {"text", {{"type", "string"}}}}, {"type", "text"});
}
OrderedJson text_or_parts() {
  return {{"oneOf", {text_type(), {{"type", "array"}, {"minItems", 1}, {"items", text_part()}}}}};
}

OrderedJson chat_message() {
  OrderedJson call = object({{"id", text_type()},
                             {"type", {{"const", "function"}}},
                             {"function", object({{"name", text_type()}, {"arguments", {{"type", "string"}}}},
                                                 {"name", "arguments"})}},
                            {"id", "type", "function"});
  return object({{"role", {{"enum", {"system", "user", "assistant", "tool"}}}},
                 {"content", text_or_parts()},
                 {"tool_calls", {{"type", "array"}, {"minItems", 1}, {"items", std::move(call)}}},
                 {"tool_call_id", text_type()}},
                {"role"});
}

OrderedJson tool_schema() {
  OrderedJson function = object({{"name", {{"type", "string"}, {"pattern", "^[a-zA-Z0-9_-]{1,64}$"}}},
                                 {"description", {{"type", "string"}}},
                                 {"parameters", {{"type", "object"}}}},
                                {"name"});
  return object({{"type", {{"const", "function"}}}, {"function", std::move(function)}}, {"type", "function"});
}

OrderedJson body_of(const std::string& name, const std::string& model) {
  const OrderedJson model_field{{"type", "string"}, {"enum", {model}}};
  if (name == "Chat") {
    OrderedJson p{{"model", model_field},
                  {"messages", {{"type", "array"}, {"minItems", 1}, {"items", chat_message()}}},
                  {"tools", {{"type", "array"}, {"items", tool_schema()}}},
                  {"tool_choice", {{"oneOf", {{{"enum", {"none", "auto", "required"}}}, {{"type", "object"}}}}}},
                  {"parallel_tool_calls", {{"type", "boolean"}}},
                  {"chat_template", {{"type", "string"}}},
                  {"chat_template_kwargs", object({{"enable_thinking", {{"type", "boolean"}}},
                                                   {"thinking_budget", {{"type", "integer"}, {"minimum", 1}}}})}};
    p.update(fields_of(kChat));
    return object(std::move(p), {"model", "messages"});
  }
  if (name == "Completion") {
    OrderedJson prompts{{"oneOf",
                         {text_type(), ids_type(),
                          {{"type", "array"}, {"minItems", 1}, {"items", text_type()}},
                          {{"type", "array"}, {"minItems", 1}, {"items", ids_type()}}}}};
    OrderedJson p{{"model", model_field}, {"prompt", std::move(prompts)}};
    p.update(fields_of(kCompletions));
    return object(std::move(p), {"model", "prompt"});
  }
  if (name == "Generate") {
    OrderedJson vllm{{"prompt", text_or_parts()}};
    vllm.update(fields_of(kVllm));
    OrderedJson tgi{{"inputs", text_or_parts()}, {"parameters", object(fields_of(kTgi))}};
    return {{"oneOf", {object(std::move(vllm), {"prompt"}), object(std::move(tgi), {"inputs"})}}};
  }
  if (name == "Tgi")
    return object({{"inputs", text_or_parts()},
                   {"stream", {{"type", "boolean"}}},
                   {"parameters", object(fields_of(kTgi))}},
                  {"inputs"});
  if (name == "Native")
    return object({{"inputs", text_or_parts()},
                   {"input_id", ids_type()},
                   {"stream", {{"type", "boolean"}}},
                   {"parameters", object(fields_of(kNative))}});
  if (name == "TritonText")
    return object({{"id", {{"type", "string"}, {"pattern", "^[a-zA-Z0-9_-]{1,256}$"}}},
                   {"text_input", text_or_parts()},
                   {"parameters", object(fields_of(kTritonText))}},
                  {"text_input"});
  if (name == "TritonTokens") {
    OrderedJson input = object({{"name", text_type()},
                                {"shape", {{"type", "array"}, {"items", {{"type", "integer"}, {"minimum", 1}}}}},
                                {"datatype", {{"const", "UINT32"}}},
                                {"data", ids_type()},
                                {"parameters", object(fields_of(kTritonTokens))}},
                               {"name", "shape", "datatype", "data"});
    return object({{"id", {{"type", "string"}, {"pattern", "^[a-zA-Z0-9_-]{1,256}$"}}},
                   {"inputs", {{"type", "array"}, {"minItems", 1}, {"maxItems", 1}, {"items", std::move(input)}}},
                   {"outputs", {{"type", "array"}, {"minItems", 1}, {"maxItems", 1},
                                {"items", object({{"name", text_type()}}, {"name"})}}}},
                  {"inputs"});
  }
  if (name == "StopInfer") return object({{"id", text_type()}}, {"id"});
  if (name == "Messages") {
    OrderedJson message = object({{"role", {{"enum", {"user", "assistant"}}}}, {"content", text_or_parts()}},
                                 {"role", "content"});
    OrderedJson tool = object({{"name", text_type()}, {"input_schema", {{"type", "object"}}}}, {"name"});
    OrderedJson p{{"model", model_field},
                  {"messages", {{"type", "array"}, {"minItems", 1}, {"items", std::move(message)}}},
                  {"system", text_or_parts()},
                  {"tools", {{"type", "array"}, {"items", std::move(tool)}}}};
    p.update(fields_of(kMessages));
    return object(std::move(p), {"model", "messages", "max_tokens"});
  }
  if (name == "Response") {
    OrderedJson p{{"model", model_field},
                  {"input", {{"oneOf", {text_type(), {{"type", "array"}, {"minItems", 1}, {"items", {{"type", "object"}}}}}}}},
                  {"instructions", {{"type", "string"}}},
                  {"tools", {{"type", "array"}, {"items", {{"type", "object"}}}}}};
    p.update(fields_of(kResponses));
    return object(std::move(p), {"model", "input"});
  }
  if (name == "Tokenizer")
    return object({{"inputs", text_type()}, {"do_decode", {{"type", "boolean"}}}}, {"inputs"});
  if (name == "Tokenize")
    return object({{"prompt", {{"type", "string"}}},
                   {"messages", {{"type", "array"}, {"minItems", 1}, {"items", chat_message()}}},
                   {"add_special_tokens", {{"type", "boolean"}}},
                   {"return_token_strs", {{"type", "boolean"}}}});
  if (name == "Detokenize") return object({{"tokens", ids_type()}}, {"tokens"});
  return object({{"model", model_field}, {"input", text_type()}}, {"model", "input"});  // Embedding
}

struct Published {
  const char* method;
  const char* path;  // {model} is our own
  const char* body;  // null: none
  const char* summary;
  bool streams = false;
};
constexpr Published kPublished[] = {
    {"post", "/v1/chat/completions", "Chat", "OpenAI chat", true},
    {"post", "/v1/completions", "Completion", "OpenAI completions", true},
    {"post", "/v1/responses", "Response", "OpenAI responses, without storage", true},
    {"post", "/v1/messages", "Messages", "Anthropic messages", true},
    {"post", "/v1/messages/count_tokens", "Messages", "tokens of Anthropic messages"},
    {"post", "/v1/embeddings", "Embedding", "refused: the model is no embedding model"},
    {"post", "/generate", "Generate", "vLLM (prompt) or TGI (inputs)", true},
    {"post", "/generate_stream", "Tgi", "TGI stream", true},
    {"post", "/", "Tgi", "TGI", true},
    {"get", "/info", nullptr, "TGI description of the model"},
    {"post", "/infer", "Native", "the original's own interface", true},
    {"post", "/infer_token", "Native", "the original's own interface", true},
    {"post", "/v2/models/{model}/generate", "TritonText", "Triton text"},
    {"post", "/v2/models/{model}/generate_stream", "TritonText", "Triton text stream", true},
    {"post", "/v2/models/{model}/infer", "TritonTokens", "Triton tokens"},
    {"post", "/v2/models/{model}/stopInfer", "StopInfer", "ends a running Triton request"},
    {"get", "/v2", nullptr, "Triton server metadata"},
    {"get", "/v2/models/{model}", nullptr, "Triton model metadata"},
    {"get", "/v2/models/{model}/config", nullptr, "Triton model configuration"},
    {"get", "/v1/models", nullptr, "models"},
    {"get", "/v1/models/{model}", nullptr, "one model"},
    {"post", "/v1/tokenizer", "Tokenizer", "counts tokens"},
    {"post", "/tokenize", "Tokenize", "text or chat to token ids"},
    {"post", "/detokenize", "Detokenize", "token ids to text"},
    {"get", "/openapi.json", nullptr, "this document"},
};

OrderedJson responses_of(const Published& route) {
  const OrderedJson error{{"application/json", {{"schema", {{"type", "object"}}}}}};
  OrderedJson ok;
  ok["application/json"] = OrderedJson{{"schema", OrderedJson::object()}};
  if (route.streams) ok["text/event-stream"] = OrderedJson{{"schema", {{"type", "string"}}}};
  OrderedJson responses{{"200", {{"description", "done"}, {"content", std::move(ok)}}}};
  const auto add = [&](const char* status, const char* text) {
    responses[status] = OrderedJson{{"description", text}, {"content", error}};
  };
  if (std::string_view(route.path).find("{model}") != std::string_view::npos || route.body != nullptr)
    add("404", "no such model, adapter or running request");
  if (route.body == nullptr && std::string_view(route.path).starts_with("/v2/models/"))
    add("405", "no such model");
  if (route.body != nullptr) {
    add("408", "the request's own timeout passed");
    add("400", "cannot be done with this model, or no valid HTTP request");
    add("413", "the body is above maxRequestLength");
    add("422", "a field or combination of fields is wrong; the text names it");
    add("424", "the engine cannot take it: prompt too long, unknown token id");
    add("429", "too many requests");
    add("500", "the engine failed or a time-out passed");
    add("503", "not serving, or the queue is full");
  }
  return responses;
}

}  // namespace

std::string openapi_document(const ServiceOptions& options) {
  OrderedJson paths;
  OrderedJson schemas;
  for (const Published& route : kPublished) {
    OrderedJson operation{{"summary", route.summary}, {"operationId", std::string(route.method) + route.path}};
    if (std::string_view(route.path).find("{model}") != std::string_view::npos)
      operation["parameters"] = OrderedJson::array(
          {{{"name", "model"},
            {"in", "path"},
            {"required", true},
            {"schema", {{"type", "string"}, {"enum", {options.model_name}}}}}});
    if (route.body != nullptr) {
      if (!schemas.contains(route.body)) schemas[route.body] = body_of(route.body, options.model_name);
      operation["requestBody"] = OrderedJson{
          {"required", true},
          {"content",
           {{"application/json",
             {{"schema", {{"$ref", std::string("#/components/schemas/") + route.body}}}}}}}};
    }
    operation["responses"] = responses_of(route);
    paths[route.path][route.method] = std::move(operation);
  }
  if (options.request_journal) {
    const OrderedJson text{{"application/json", {{"schema", {{"type", "object"}}}}}};
    paths["/v1/requests/{id}"]["get"] = OrderedJson{
        {"summary", "the answer to a request of the journal, once"},
        {"operationId", "getRequest"},
        {"parameters",
         {{{"name", "id"}, {"in", "path"}, {"required", true}, {"schema", {{"type", "string"}}}}}},
        {"responses",
         {{"default", {{"description", "as the request's own route answers"}, {"content", text}}},
          {"202", {{"description", "it is running"}, {"content", text}}},
          {"404", {{"description", "no such request of this client is kept"}, {"content", text}}}}}};
  }
  const OrderedJson document{{"openapi", "3.1.0"},
                             {"info", {{"title", "Phalanx"}, {"version", "1.0.0"}}},
                             {"paths", std::move(paths)},
                             {"components", {{"schemas", std::move(schemas)}}}};
  return dump(document);
}

void mount_openapi(const std::shared_ptr<Core>& core, Server& server) {
  server.route(kBusiness, "GET", "/openapi.json",
               [text = openapi_document(core->options)](const HttpRequest&,
                                                        const std::shared_ptr<Responder>& responder) {
                 responder->respond({.body = text, .headers = {}});
               });
}

}  // namespace phalanx::api
