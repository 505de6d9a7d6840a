#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "phalanx/api/inference.h"
#include "phalanx/api/openai_answer.h"
#include "phalanx/api/refusal.h"

// Anthropic's POST /v1/messages and /v1/messages/count_tokens, in their plain form: texts, tools and
// thinking, no files and no caching.
namespace phalanx::api {
namespace {

using nlohmann::json;

const char* error_type(int status) {
  switch (status) {
    case 401: return "authentication_error";
    case 404: return "not_found_error";
    case 413: return "request_too_large";
    case 429: return "rate_limit_error";
    case 503: return "overloaded_error";
    default: return status < 500 ? "invalid_request_error" : "api_error";
  }
}

std::string message_error(int status, const std::string& error, const std::string&) {
  return dump({{"type", "error"}, {"error", {{"type", error_type(status)}, {"message", error}}}});
}

std::string text_of(const json& content, const std::string& where) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) throw Refused(where + ": expected a string or an array of content blocks");
  std::string text;
  for (const json& block : content) {
    const bool is_text = block.is_object() && block.contains("type") && block["type"] == "text" &&
                         block.contains("text") && block["text"].is_string();
    if (!is_text) throw Refused(where + ": this model takes content blocks of type text only");
    text += block["text"].get_ref<const std::string&>();
  }
  return text;
}

// One of Anthropic's messages as OpenAI's: results of tools become messages of their own.
void add_message(const json& message, const std::string& where, OrderedJson* out) {
  const bool shaped = message.is_object() && message.contains("role") && message.contains("content");
  if (!shaped || (message["role"] != "user" && message["role"] != "assistant"))
    throw Refused(where + ": expected an object with content and a role of user or assistant");
  const std::string role = message["role"];
  const json& content = message["content"];
  if (!content.is_array()) {
    out->push_back({{"role", role}, {"content", text_of(content, where + ".content")}});
    return;
  }
  std::string text;
  OrderedJson calls = OrderedJson::array();
  bool results = false;
  for (size_t i = 0; i < content.size(); ++i) {
    const json& block = content[i];
    const std::string here = fmt::format("{}.content.{}", where, i);
    const std::string type = block.is_object() && block.contains("type") && block["type"].is_string()
                                 ? block["type"].get<std::string>()
                                 : "";
    const auto need = [&](const char* key) -> const std::string& {
      if (!block.contains(key) || !block[key].is_string())
        throw Refused(fmt::format("{}.{}: expected a string", here, key));
      return block[key].get_ref<const std::string&>();
    };
    if (type == "text") {
      text += need("text");
    } else if (type == "thinking" || type == "redacted_thinking") {
      continue;  // not shown to the model again
    } else if (type == "tool_use" && role == "assistant") {
      if (!block.contains("input") || !block["input"].is_object())
        throw Refused(here + ".input: expected an object");
      calls.push_back({{"id", need("id")},
                       {"type", "function"},
                       {"function", {{"name", need("name")}, {"arguments", block["input"].dump()}}}});
    } else if (type == "tool_result" && role == "user") {
      results = true;
      const std::string result =
          block.contains("content") ? text_of(block["content"], here + ".content") : "";
      out->push_back({{"role", "tool"},
                      {"tool_call_id", need("tool_use_id")},
                      {"content", result.empty() ? " " : result}});
    } else {
      throw Refused(fmt::format("{}: found type '{}', expected text, tool_use, tool_result or thinking",
                                here, type));
    }
  }
  if (text.empty() && calls.empty() && results) return;
  OrderedJson own{{"role", role}, {"content", text}};
  if (!calls.empty()) own["tool_calls"] = std::move(calls);
  out->push_back(std::move(own));
}

OrderedJson openai_tools(const json& tools, const OrderedJson& ordered) {
  OrderedJson out = OrderedJson::array();
  if (!tools.is_array()) throw Refused("tools: expected an array");
  for (size_t i = 0; i < tools.size(); ++i) {
    const bool shaped = tools[i].is_object() && tools[i].contains("name") && tools[i]["name"].is_string();
    if (!shaped) throw Refused(fmt::format("tools.{}: expected an object with a name", i));
    OrderedJson function{{"name", tools[i]["name"].get<std::string>()}};
    if (tools[i].contains("description")) function["description"] = ordered[i]["description"];
    function["parameters"] = tools[i].contains("input_schema") ? ordered[i]["input_schema"]
                                                               : OrderedJson{{"type", "object"}};
    out.push_back({{"type", "function"}, {"function", std::move(function)}});
  }
  return out;
}

OrderedJson openai_choice(const json& choice, bool* parallel) {
  if (!choice.is_object() || !choice.contains("type") || !choice["type"].is_string())
    throw Refused("tool_choice: expected an object with a type");
  if (choice.contains("disable_parallel_tool_use") && choice["disable_parallel_tool_use"] == true)
    *parallel = false;
  const std::string type = choice["type"];
  if (type == "auto" || type == "none") return type;
  if (type == "any") return "required";
  if (type == "tool" && choice.contains("name") && choice["name"].is_string())
    return {{"type", "function"}, {"function", {{"name", choice["name"].get<std::string>()}}}};
  throw Refused(fmt::format("tool_choice.type: found '{}', expected auto, any, tool with a name, or none", type));
}

ChatRequest parse_messages(const std::string& body, const ServiceOptions& options, bool count_only) {
  const json request = parse_body(body, options.max_json_depth);
  const OrderedJson ordered = OrderedJson::parse(body);
  Fields fields(request);
  check_model(fields, options, "Model not found");
  const json* messages = fields.find("messages");
  if (messages == nullptr || !messages->is_array() || messages->empty())
    throw Refused("messages: expected a non-empty array");
  if (!count_only && fields.find("max_tokens") == nullptr) throw Refused("max_tokens: field required");

  OrderedJson chat{{"model", options.model_name}, {"messages", OrderedJson::array()}};
  if (const json* system = fields.find("system"))
    chat["messages"].push_back({{"role", "system"}, {"content", text_of(*system, "system")}});
  for (size_t i = 0; i < messages->size(); ++i)
    add_message((*messages)[i], fmt::format("messages.{}", i), &chat["messages"]);
  if (const json* tools = fields.find("tools")) chat["tools"] = openai_tools(*tools, ordered["tools"]);
  if (const json* choice = fields.find("tool_choice")) {
    bool parallel = true;
    chat["tool_choice"] = openai_choice(*choice, &parallel);
    chat["parallel_tool_calls"] = parallel;
  }
  if (const json* thinking = fields.find("thinking")) {
    if (!thinking->is_object() || !thinking->contains("type") ||
        ((*thinking)["type"] != "enabled" && (*thinking)["type"] != "disabled"))
      throw Refused("thinking.type: expected enabled or disabled");
    const bool enabled = (*thinking)["type"] == "enabled";
    chat["chat_template_kwargs"] = OrderedJson{{"enable_thinking", enabled}};
    if (enabled && thinking->contains("budget_tokens"))
      chat["chat_template_kwargs"]["thinking_budget"] = ordered["thinking"]["budget_tokens"];
  }
  ServiceOptions deep = options;
  deep.max_json_depth += 2;  // what the conversion adds
  ChatRequest out = parse_chat(dump(chat), deep);
  out.fields = read_sampling(fields, kMessages, options, body);
  (void)fields.find("metadata");
  (void)fields.find("service_tier");
  out.ignored = out.fields.ignored;
  for (const std::string& name : fields.unread()) out.ignored.push_back(name);
  return out;
}

const char* stop_word(engine::FinishReason reason, bool by_string, bool calls) {
  if (calls) return "tool_use";
  if (reason == engine::FinishReason::kLength) return "max_tokens";
  return by_string ? "stop_sequence" : "end_turn";
}

OrderedJson input_of(const text::ToolCall& call) {
  auto input = OrderedJson::parse(call.arguments, nullptr, false);
  return input.is_object() ? input : OrderedJson::object();
}

class MessageAnswer final : public Answer {
 public:
  MessageAnswer(std::shared_ptr<Responder> responder, std::string id, std::string model, bool stream,
                OutputFormat format, int64_t prompt_tokens,
                std::vector<std::pair<std::string, std::string>> headers)
      : responder_(std::move(responder)),
        id_(std::move(id)),
        model_(std::move(model)),
        stream_(stream),
        format_(std::move(format)),
        prompt_tokens_(prompt_tokens),
        output_(format_),
        headers_(std::move(headers)) {}

  void start() override {
    if (!stream_) return;
    started_ = true;
    responder_->start_stream(200, "text/event-stream", headers_);
    OrderedJson message = frame();
    message["content"] = OrderedJson::array();
    message["stop_reason"] = nullptr;
    message["stop_sequence"] = nullptr;
    message["usage"] = OrderedJson{{"input_tokens", prompt_tokens_}, {"output_tokens", 0}};
    send("message_start", {{"message", std::move(message)}});
  }

  void piece(const Piece& piece, const Usage& usage) override {
    const bool last = piece.finish != engine::FinishReason::kNone;
    const ChatDelta delta = output_.push(piece.text, piece.tokens, last);
    if (!delta.reasoning.empty()) add("thinking", "thinking_delta", delta.reasoning);
    if (!delta.content.empty()) add("text", "text_delta", delta.content);
    for (const NumberedCall& call : delta.calls) add_call(call);
    if (!last) return;
    close();
    const auto* stop = std::get_if<std::string>(&piece.stop_reason);
    reason_ = stop_word(piece.finish, stop != nullptr, output_.any_call());
    if (stop != nullptr) stop_ = *stop;
    if (!stream_) return;
    send("message_delta", {{"delta", {{"stop_reason", reason_}, {"stop_sequence", stop_}}},
                           {"usage", {{"output_tokens", usage.completion_tokens}}}});
    send("message_stop", OrderedJson::object());
  }

  void finish(const Outcome& outcome) override {
    if (stream_) return responder_->end();
    OrderedJson body = frame();
    body["content"] = std::move(blocks_);
    body["stop_reason"] = reason_;
    body["stop_sequence"] = stop_;
    body["usage"] = OrderedJson{{"input_tokens", outcome.usage.prompt_tokens},
                                {"cache_read_input_tokens", outcome.usage.cached_tokens},
                                {"output_tokens", outcome.usage.completion_tokens}};
    responder_->respond({.body = dump(body), .headers = headers_});
  }

  void fail(const Refusal& refusal) override {
    if (!started_) return responder_->respond(to_response(refusal));
    responder_->write("event: error\ndata: " + message_error(refusal.status, refusal.error, {}) + "\n\n");
    responder_->end();
  }

 private:
  [[nodiscard]] OrderedJson frame() const {
    return {{"id", id_}, {"type", "message"}, {"role", "assistant"}, {"model", model_}};
  }
  void send(const char* type, const OrderedJson& fields) {
    OrderedJson event{{"type", type}};
    event.update(fields);
    responder_->write(fmt::format("event: {}\ndata: {}\n\n", type, dump(event)));
  }
  void open(const std::string& kind, OrderedJson block) {
    close();
    open_ = kind;
    if (stream_) send("content_block_start", {{"index", index_}, {"content_block", block}});
    blocks_.push_back(std::move(block));
  }
  void close() {
    if (open_.empty()) return;
    if (stream_) send("content_block_stop", {{"index", index_}});
    ++index_;
    open_.clear();
  }
  // Text for the open block of this kind, which is opened if need be.
  void add(const std::string& kind, const char* delta, const std::string& text) {
    if (open_ != kind) {
      OrderedJson block{{"type", kind}, {kind, ""}};
      if (kind == "thinking") block["signature"] = "";
      open(kind, std::move(block));
    }
    if (stream_) send("content_block_delta", {{"index", index_}, {"delta", {{"type", delta}, {kind, text}}}});
    auto& own = blocks_.back()[kind];
    own = own.get<std::string>() + text;
  }
  void add_call(const NumberedCall& call) {
    open("tool_use", {{"type", "tool_use"},
                      {"id", "toolu_" + call.id.substr(5)},
                      {"name", call.call.name},
                      {"input", OrderedJson::object()}});
    if (stream_)
      send("content_block_delta",
           {{"index", index_},
            {"delta", {{"type", "input_json_delta"}, {"partial_json", call.call.arguments}}}});
    blocks_.back()["input"] = input_of(call.call);
    close();
  }

  std::shared_ptr<Responder> responder_;
  std::string id_, model_;
  bool stream_;
  const OutputFormat format_;
  int64_t prompt_tokens_;
  ChatOutput output_;
  std::vector<std::pair<std::string, std::string>> headers_;
  bool started_ = false;
  OrderedJson blocks_ = OrderedJson::array();
  std::string open_;  // kind of the open block
  int index_ = 0;
  std::string reason_ = "end_turn";
  OrderedJson stop_ = nullptr;
};

void create(InferenceCall& call) {
  const ChatRequest request = parse_messages(call.request.body, call.core.options, false);
  PreparedChat prepared = prepare_chat(call, request.fields, request.wishes);
  auto answer = std::make_unique<MessageAnswer>(
      call.responder, request_id(call, "msg_"), answering_model(call, request.fields), request.fields.stream,
      std::move(prepared.output), std::ssize(prepared.spec.prompts.front()),
      ignored_headers(request.ignored));
  call.core.generate.start(std::move(prepared.spec), std::move(answer), call.responder);
}

void count(InferenceCall& call) {
  const ChatRequest request = parse_messages(call.request.body, call.core.options, true);
  const PreparedChat prepared = prepare_chat(call, request.fields, request.wishes);
  call.responder->respond({.body = dump({{"input_tokens", prepared.spec.prompts.front().size()}}),
                           .headers = ignored_headers(request.ignored)});
}

}  // namespace

void mount_messages(const std::shared_ptr<Core>& core, Server& server) {
  server.route(kBusiness, "POST", "/v1/messages", inference_handler(core, create, message_error));
  server.route(kBusiness, "POST", "/v1/messages/count_tokens",
               inference_handler(core, count, message_error));
}

}  // namespace phalanx::api
