#include <fmt/format.h>

#include <ctime>
#include <nlohmann/json.hpp>

#include "phalanx/api/inference.h"
#include "phalanx/api/openai_answer.h"
#include "phalanx/api/refusal.h"

// OpenAI's POST /v1/responses in its plain form: nothing is stored, no built-in tools, no files.
namespace phalanx::api {
namespace {

using nlohmann::json;

std::string response_error(int status, const std::string& error, const std::string&) {
  return dump({{"error",
                {{"message", error},
                 {"type", status < 500 ? "invalid_request_error" : "server_error"},
                 {"param", nullptr},
                 {"code", nullptr}}}});
}

std::string part_text(const json& content, const std::string& where) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) throw Refused(where + ": expected a string or an array of parts");
  std::string text;
  for (const json& part : content) {
    const std::string type = part.is_object() && part.contains("type") && part["type"].is_string()
                                 ? part["type"].get<std::string>()
                                 : "";
    if ((type != "input_text" && type != "output_text" && type != "text") || !part.contains("text") ||
        !part["text"].is_string())
      throw Refused(where + ": this model takes parts of type input_text and output_text only");
    text += part["text"].get_ref<const std::string&>();
  }
  return text;
}

void add_item(const json& item, const std::string& where, OrderedJson* messages) {
  if (!item.is_object()) throw Refused(where + ": expected an object");
  const auto text = [&](const char* key) -> std::string {
    if (!item.contains(key) || !item[key].is_string())
      throw Refused(fmt::format("{}.{}: expected a string", where, key));
    return item[key].get<std::string>();
  };
  const std::string type = item.contains("type") ? text("type") : "message";
  if (type == "message") {
    std::string role = text("role");
    if (role == "developer") role = "system";
    if (role != "user" && role != "assistant" && role != "system")
      throw Refused(where + ".role: expected user, assistant, system or developer");
    if (!item.contains("content")) throw Refused(where + ".content: field required");
    messages->push_back({{"role", role}, {"content", part_text(item["content"], where + ".content")}});
  } else if (type == "function_call") {
    messages->push_back(
        {{"role", "assistant"},
         {"content", ""},
         {"tool_calls",
          OrderedJson::array({{{"id", text("call_id")},
                               {"type", "function"},
                               {"function", {{"name", text("name")}, {"arguments", text("arguments")}}}}})}});
  } else if (type == "function_call_output") {
    if (!item.contains("output")) throw Refused(where + ".output: field required");
    messages->push_back({{"role", "tool"},
                         {"tool_call_id", text("call_id")},
                         {"content", part_text(item["output"], where + ".output")}});
  } else if (type != "reasoning") {
    throw Refused(fmt::format("{}.type: found '{}', expected message, function_call, "
                              "function_call_output or reasoning",
                              where, type));
  }
}

struct ResponseRequest {
  ChatRequest chat;
  OrderedJson instructions = nullptr;
};

ResponseRequest parse_response(const std::string& body, const ServiceOptions& options) {
  const json request = parse_body(body, options.max_json_depth);
  const OrderedJson ordered = OrderedJson::parse(body);
  Fields fields(request);
  check_model(fields, options, "Model not found");
  ResponseRequest out;
  OrderedJson chat{{"model", options.model_name}, {"messages", OrderedJson::array()}};
  if (const auto instructions = fields.string("instructions")) {
    out.instructions = *instructions;
    chat["messages"].push_back({{"role", "system"}, {"content", *instructions}});
  }
  const json* input = fields.find("input");
  if (input == nullptr) throw Refused("input: field required");
  if (input->is_string()) {
    chat["messages"].push_back({{"role", "user"}, {"content", input->get<std::string>()}});
  } else {
    if (!input->is_array() || input->empty())
      throw Refused("input: expected a string or a non-empty array of items");
    for (size_t i = 0; i < input->size(); ++i)
      add_item((*input)[i], fmt::format("input[{}]", i), &chat["messages"]);
  }
  if (fields.find("previous_response_id") != nullptr)
    throw Refused("previous_response_id: this server stores no responses; send the whole conversation "
                  "as input");
  if (fields.boolean("background").value_or(false))
    throw Refused("background: this server answers in the foreground only");
  if (const json* tools = fields.find("tools")) {
    if (!tools->is_array()) throw Refused("tools: expected an array");
    OrderedJson list = OrderedJson::array();
    for (size_t i = 0; i < tools->size(); ++i) {
      const json& tool = (*tools)[i];
      if (!tool.is_object() || tool.value("type", json()) != "function")
        throw Refused(fmt::format("tools[{}]: this server has no built-in tools, expected type function", i));
      OrderedJson function = ordered["tools"][i];
      function.erase("type");
      function.erase("strict");
      list.push_back({{"type", "function"}, {"function", std::move(function)}});
    }
    if (!list.empty()) chat["tools"] = std::move(list);
  }
  if (const json* choice = fields.find("tool_choice")) {
    if (choice->is_object() && choice->contains("name"))
      chat["tool_choice"] = OrderedJson{{"type", "function"}, {"function", {{"name", ordered["tool_choice"]["name"]}}}};
    else
      chat["tool_choice"] = ordered["tool_choice"];
  }
  if (const auto parallel = fields.boolean("parallel_tool_calls")) chat["parallel_tool_calls"] = *parallel;
  std::vector<std::string> ignored;
  const json* text = fields.find("text");
  if (text != nullptr && !text->is_object()) throw Refused("text: expected an object");
  if (text != nullptr)
    for (const auto& [key, value] : text->items())
      if (key != "format") ignored.push_back("text." + key);
  if (text != nullptr && text->contains("format")) {
    OrderedJson format = ordered["text"]["format"];
    if (format.is_object() && format.value("type", OrderedJson()) == "json_schema") {
      OrderedJson inner;
      for (const char* key : {"name", "schema", "strict"})
        if (format.contains(key)) inner[key] = format[key];
      format = OrderedJson{{"type", "json_schema"}, {"json_schema", std::move(inner)}};
    }
    chat["response_format"] = std::move(format);
  }
  if (const json* reasoning = fields.find("reasoning"); reasoning != nullptr && !reasoning->is_object())
    throw Refused("reasoning: expected an object");
  ServiceOptions deep = options;
  deep.max_json_depth += 3;  // what the conversion adds
  out.chat = parse_chat(dump(chat), deep);
  auto grammar = std::move(out.chat.fields.grammar);
  out.chat.fields = read_sampling(fields, kResponses, options, body);
  out.chat.fields.grammar = std::move(grammar);
  for (const char* name : {"store", "metadata", "user", "include", "truncation", "reasoning"})
    (void)fields.find(name);
  out.chat.ignored = out.chat.fields.ignored;
  out.chat.ignored.insert(out.chat.ignored.end(), ignored.begin(), ignored.end());
  for (const std::string& name : fields.unread()) out.chat.ignored.push_back(name);
  return out;
}

class ResponseAnswer final : public Answer {
 public:
  ResponseAnswer(std::shared_ptr<Responder> responder, std::string id, std::string model,
                 OrderedJson instructions, bool stream, OutputFormat format,
                 std::vector<std::pair<std::string, std::string>> headers)
      : responder_(std::move(responder)),
        id_(std::move(id)),
        model_(std::move(model)),
        instructions_(std::move(instructions)),
        stream_(stream),
        format_(std::move(format)),
        output_(format_),
        headers_(std::move(headers)) {}

  void start() override {
    if (!stream_) return;
    started_ = true;
    responder_->start_stream(200, "text/event-stream", headers_);
    send("response.created", {{"response", frame("in_progress", nullptr)}});
    send("response.in_progress", {{"response", frame("in_progress", nullptr)}});
  }

  void piece(const Piece& piece, const Usage& usage) override {
    const bool last = piece.finish != engine::FinishReason::kNone;
    const ChatDelta delta = output_.push(piece.text, piece.tokens, last);
    if (!delta.reasoning.empty()) add_text("reasoning", delta.reasoning);
    if (!delta.content.empty()) add_text("message", delta.content);
    for (const NumberedCall& call : delta.calls) add_call(call);
    if (!last) return;
    if (items_.empty() && open_.empty()) add_text("message", "");
    close();
    finish_ = piece.finish;
    if (stream_) {
      const bool cut = finish_ == engine::FinishReason::kLength;
      send(cut ? "response.incomplete" : "response.completed",
           {{"response", frame(cut ? "incomplete" : "completed", usage_of(usage))}});
    }
  }

  void finish(const Outcome& outcome) override {
    if (stream_) return responder_->end();
    const bool cut = finish_ == engine::FinishReason::kLength;
    responder_->respond({.body = dump(frame(cut ? "incomplete" : "completed", usage_of(outcome.usage))),
                         .headers = headers_});
  }

  void fail(const Refusal& refusal) override {
    if (!started_) return responder_->respond(to_response(refusal));
    send("error", {{"code", "server_error"}, {"message", refusal.error}, {"param", nullptr}});
    responder_->end();
  }

 private:
  [[nodiscard]] OrderedJson usage_of(const Usage& usage) const {
    return {{"input_tokens", usage.prompt_tokens},
            {"input_tokens_details", {{"cached_tokens", usage.cached_tokens}}},
            {"output_tokens", usage.completion_tokens},
            {"output_tokens_details", {{"reasoning_tokens", output_.reasoning_tokens()}}},
            {"total_tokens", usage.prompt_tokens + usage.completion_tokens}};
  }
  [[nodiscard]] OrderedJson frame(const std::string& status, OrderedJson usage) const {
    OrderedJson json{{"id", id_}, {"object", "response"}, {"created_at", created_}, {"status", status}};
    json["error"] = nullptr;
    json["incomplete_details"] = status == "incomplete"
                                     ? OrderedJson{{"reason", "max_output_tokens"}}
                                     : OrderedJson(nullptr);
    json["instructions"] = instructions_;
    json["model"] = model_;
    json["output"] = items_;
    json["parallel_tool_calls"] = format_.parallel;
    json["tool_choice"] = "auto";
    json["tools"] = format_.tools.empty() ? OrderedJson::array() : response_tools();
    json["store"] = false;
    json["usage"] = std::move(usage);
    return json;
  }
  [[nodiscard]] OrderedJson response_tools() const {
    OrderedJson list = OrderedJson::array();
    for (const auto& tool : OrderedJson::parse(format_.tools)) {
      OrderedJson own{{"type", "function"}};
      own.update(tool["function"]);
      list.push_back(std::move(own));
    }
    return list;
  }
  void send(const char* type, const OrderedJson& fields) {
    OrderedJson event{{"type", type}, {"sequence_number", sequence_++}};
    event.update(fields);
    responder_->write(fmt::format("event: {}\ndata: {}\n\n", type, dump(event)));
  }
  [[nodiscard]] std::string item_id(const char* prefix) const {
    return fmt::format("{}_{}_{}", prefix, id_, items_.size());
  }
  [[nodiscard]] OrderedJson open_item(const std::string& status) const {
    if (open_ == "reasoning")
      return {{"id", open_id_},
              {"type", "reasoning"},
              {"summary", OrderedJson::array()},
              {"content", OrderedJson::array({{{"type", "reasoning_text"}, {"text", text_}}})},
              {"status", status}};
    OrderedJson content = OrderedJson::array();
    if (status == "completed")
      content.push_back({{"type", "output_text"}, {"text", text_}, {"annotations", OrderedJson::array()}});
    return {{"id", open_id_},
            {"type", "message"},
            {"role", "assistant"},
            {"status", status},
            {"content", std::move(content)}};
  }
  void add_text(const std::string& kind, const std::string& text) {
    const bool message = kind == "message";
    if (open_ != kind) {
      close();
      open_ = kind;
      open_id_ = item_id(message ? "msg" : "rs");
      text_.clear();
      if (stream_) {
        send("response.output_item.added", {{"output_index", items_.size()}, {"item", open_item("in_progress")}});
        if (message)
          send("response.content_part.added",
               {{"item_id", open_id_}, {"output_index", items_.size()}, {"content_index", 0},
                {"part", {{"type", "output_text"}, {"text", ""}, {"annotations", OrderedJson::array()}}}});
      }
    }
    text_ += text;
    if (!stream_ || text.empty()) return;
    OrderedJson event{{"item_id", open_id_}, {"output_index", items_.size()}, {"content_index", 0}, {"delta", text}};
    if (message) event["logprobs"] = OrderedJson::array();
    send(message ? "response.output_text.delta" : "response.reasoning_text.delta", event);
  }
  void close() {
    if (open_.empty()) return;
    OrderedJson item = open_item("completed");
    if (stream_) {
      const bool message = open_ == "message";
      OrderedJson done{{"item_id", open_id_}, {"output_index", items_.size()}, {"content_index", 0}, {"text", text_}};
      if (message) done["logprobs"] = OrderedJson::array();
      send(message ? "response.output_text.done" : "response.reasoning_text.done", done);
      if (message)
        send("response.content_part.done",
             {{"item_id", open_id_}, {"output_index", items_.size()}, {"content_index", 0},
              {"part", item["content"][0]}});
      send("response.output_item.done", {{"output_index", items_.size()}, {"item", item}});
    }
    items_.push_back(std::move(item));
    open_.clear();
  }
  void add_call(const NumberedCall& call) {
    close();
    const std::string id = item_id("fc");
    OrderedJson item{{"id", id}, {"type", "function_call"}, {"call_id", call.id}, {"name", call.call.name},
                     {"arguments", ""}, {"status", "in_progress"}};
    if (stream_) send("response.output_item.added", {{"output_index", items_.size()}, {"item", item}});
    item["arguments"] = call.call.arguments;
    item["status"] = "completed";
    if (stream_) {
      send("response.function_call_arguments.delta",
           {{"item_id", id}, {"output_index", items_.size()}, {"delta", call.call.arguments}});
      send("response.function_call_arguments.done",
           {{"item_id", id}, {"output_index", items_.size()}, {"name", call.call.name},
            {"arguments", call.call.arguments}});
      send("response.output_item.done", {{"output_index", items_.size()}, {"item", item}});
    }
    items_.push_back(std::move(item));
  }

  std::shared_ptr<Responder> responder_;
  std::string id_, model_;
  OrderedJson instructions_;
  bool stream_;
  const OutputFormat format_;
  ChatOutput output_;
  std::vector<std::pair<std::string, std::string>> headers_;
  const int64_t created_ = static_cast<int64_t>(std::time(nullptr));
  bool started_ = false;
  int64_t sequence_ = 0;
  OrderedJson items_ = OrderedJson::array();
  std::string open_, open_id_, text_;  // the item that grows: "message", "reasoning" or ""
  engine::FinishReason finish_ = engine::FinishReason::kNone;
};

void create(InferenceCall& call) {
  ResponseRequest request = parse_response(call.request.body, call.core.options);
  PreparedChat prepared = prepare_chat(call, request.chat.fields, request.chat.wishes);
  auto answer = std::make_unique<ResponseAnswer>(
      call.responder, request_id(call, "resp_"), answering_model(call, request.chat.fields),
      std::move(request.instructions), request.chat.fields.stream, std::move(prepared.output),
      ignored_headers(request.chat.ignored));
  call.core.generate.start(std::move(prepared.spec), std::move(answer), call.responder);
}

}  // namespace

void mount_responses(const std::shared_ptr<Core>& core, Server& server) {
  server.route(kBusiness, "POST", "/v1/responses", inference_handler(core, create, response_error));
}

}  // namespace phalanx::api
