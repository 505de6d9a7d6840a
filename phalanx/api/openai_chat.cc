#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "phalanx/api/fields.h"
#include "phalanx/api/openai_answer.h"
#include "phalanx/api/refusal.h"
#include "phalanx/text/chat_template.h"

namespace phalanx::api {
namespace {

using nlohmann::json;

constexpr size_t kMaxTemplateBytes = text::ChatTemplate::kMaxClientTemplate;

bool absent(const json& object, const char* key) {
  const auto it = object.find(key);
  return it == object.end() || it->is_null();
}

// Letters, digits, underscore, dash and U+4E00 to U+9FA5; 1 to 64 characters.
bool is_function_name(const std::string& name) {
  int characters = 0;
  for (size_t i = 0; i < name.size(); ++characters) {
    const auto c = static_cast<unsigned char>(name[i]);
    if (c < 0x80) {
      if (std::isalnum(c) == 0 && c != '_' && c != '-') return false;
      ++i;
    } else {
      if (i + 2 >= name.size() || (c & 0xF0) != 0xE0) return false;
      const uint32_t point = (static_cast<uint32_t>(c & 0x0F) << 12) |
                             (static_cast<uint32_t>(name[i + 1] & 0x3F) << 6) |
                             static_cast<uint32_t>(name[i + 2] & 0x3F);
      if (point < 0x4E00 || point > 0x9FA5) return false;
      i += 3;
    }
  }
  return characters >= 1 && characters <= 64;
}

void check_tool(const json& tool) {
  if (!tool.is_object() || !tool.contains("type") || tool["type"] != "function")
    throw Refused("Tool param not function type");
  const auto function = tool.find("function");
  if (function == tool.end() || !function->is_object())
    throw Refused("Tool param invalid, tool function not exist");
  const auto name = function->find("name");
  const std::string text = name != function->end() && name->is_string() ? name->get<std::string>() : "";
  if (!is_function_name(text))
    throw Refused(
        "The name of function must be a-z, A-Z, 0-9, common chinese characters, underscores and dash "
        "within max length of 64, unexpected function name: " +
        text);
}

// What the model is offered: indices into `tools`, and whether it must call one of them.
struct Offer {
  std::vector<size_t> tools;
  bool forced = false;
};
Offer offered_tools(Fields& fields, const json* tools) {
  Offer offer;
  const json* choice = fields.find("tool_choice");
  std::string only;
  bool none = false;
  if (choice != nullptr && choice->is_string()) {
    if (*choice != "none" && *choice != "auto" && *choice != "required")
      throw Refused("Parameter tool_choice string not in [none, auto, required]");
    none = *choice == "none";
    offer.forced = *choice == "required";
  } else if (choice != nullptr && choice->is_object()) {
    check_tool(*choice);
    only = (*choice)["function"]["name"].get<std::string>();
    offer.forced = true;
  } else if (choice != nullptr) {
    throw Refused("Parameter tool_choice not string or object");
  }
  if (tools != nullptr && !tools->is_array()) throw Refused("Tools not array");
  for (size_t i = 0; tools != nullptr && i < tools->size(); ++i) {
    check_tool((*tools)[i]);
    if (!none && (only.empty() || (*tools)[i]["function"]["name"] == only)) offer.tools.push_back(i);
  }
  if (!only.empty() && offer.tools.empty())
    throw Refused(fmt::format("Parameter tool_choice names the function {}, which is not in tools", only));
  if (offer.forced && offer.tools.empty())
    throw Refused("Parameter tool_choice is required, but tools is absent or empty");
  return offer;
}

void check_tool_calls(const json& calls) {
  const auto need_string = [](const json& object, const char* key, const std::string& what) {
    if (absent(object, key)) throw Refused(fmt::format("Tool call param contains no {}.", what));
    if (!object[key].is_string())
      throw Refused(fmt::format("Tool call param {} expected to be a string", what));
  };
  if (!calls.is_array() || calls.empty()) throw Refused("Tool call param is not a non-empty array.");
  for (const auto& call : calls) {
    if (!call.is_object()) throw Refused("Tool call param contains no id.");
    need_string(call, "id", "id");
    need_string(call, "type", "type");
    if (call["type"] != "function") throw Refused("Tool call param type expected to be function");
    if (absent(call, "function") || !call["function"].is_object())
      throw Refused("Tool call param contains no function.");
    need_string(call["function"], "name", "function name");
    need_string(call["function"], "arguments", "function arguments");
  }
}

// The text of a message; parts of type text are joined.
std::string content_text(const json& content, size_t message) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) throw Refused("The type of inputs is abnormal");
  if (content.empty()) throw Refused("Inputs arr is empty");
  std::string text;
  for (size_t i = 0; i < content.size(); ++i) {
    const auto& part = content[i];
    if (!part.is_object() || absent(part, "type") || !part["type"].is_string())
      throw Refused("The type of inputs is abnormal");
    if (part["type"] != "text")
      throw Refused(fmt::format("messages[{}].content[{}] is of type {}, but this model takes text only",
                                message, i, part["type"].dump()));
    if (absent(part, "text") || !part["text"].is_string())
      throw Refused("The type of inputs is abnormal");
    text += part["text"].get_ref<const std::string&>();
  }
  return text;
}

// One message as the template gets it: `ordered` keeps the order of keys of tool calls.
OrderedJson read_message(const json& message, const OrderedJson& ordered, size_t index, bool tools,
                         int64_t* units) {
  if (!message.is_object() || absent(message, "role"))
    throw Refused("Request param contains not role or role null");
  if (!message["role"].is_string()) throw Refused("role must be string type.");
  const std::string role = message["role"];
  if (tools && role != "system" && role != "assistant" && role != "user" && role != "tool")
    throw Refused("Request param contains role must be system, assistant, user or tool");
  const bool calls = role == "assistant" && !absent(message, "tool_calls");
  if (calls) check_tool_calls(message["tool_calls"]);
  if (absent(message, "content") && !calls)
    throw Refused("Request param contains not content or content null");

  OrderedJson out = ordered;
  if (!absent(message, "content")) {
    std::string text = content_text(message["content"], index);
    if (role == "assistant" && !calls && text.empty())
      throw Refused("Request param \"content\" should not be empty");
    if (tools && role != "tool" && !calls && text.empty())
      throw Refused("Request param content len should not be 0");
    *units += utf16_units(text);
    out["content"] = std::move(text);
  } else {
    out["content"] = "";  // templates add texts together
  }
  if (role == "tool") {
    if (absent(message, "tool_call_id") || !message["tool_call_id"].is_string())
      throw Refused("Request param contains not tool_call_id or tool_call_id null while role is tool");
    if (message["tool_call_id"].get_ref<const std::string&>().empty())
      throw Refused("Request param tool_call_id len should not be 0 while role is tool");
  }
  return out;
}

std::string type_word(const json& value) { return value.type_name(); }

void read_template_kwargs(Fields& fields, ChatWishes* out) {
  const json* kwargs = fields.find("chat_template_kwargs");
  if (kwargs == nullptr) return;
  if (!kwargs->is_object()) throw Refused("chat_template_kwargs must be a JSON object");
  const auto thinking = kwargs->find("enable_thinking");
  if (thinking != kwargs->end() && !thinking->is_null()) {
    if (!thinking->is_boolean())
      throw Refused("enable_thinking must be boolean, got " + type_word(*thinking));
    out->thinking_known = true;
    out->thinking = thinking->get<bool>();
  }
  Fields inner(*kwargs);
  if (out->thinking)
    out->thinking_budget =
        inner
            .integer("thinking_budget",
                     {.low = 1, .high = 2147483647,
                      .before = "Parameter thinking_budget must be in [1,2147483647], got "})
            .value_or(-1);
  out->chat.kwargs = kwargs->dump();
}

OrderedJson logprobs_json(const std::vector<TokenPiece>& tokens, const TextPort& text) {
  const auto entry = [&text](int32_t id, float logprob) {
    OrderedJson json;
    json["token"] = text.token_text(id);
    json["logprob"] = logprob;
    json["bytes"] = OrderedJson::array();
    for (const char c : text.token_bytes(id)) json["bytes"].push_back(static_cast<unsigned char>(c));
    return json;
  };
  OrderedJson content = OrderedJson::array();
  for (const TokenPiece& token : tokens) {
    OrderedJson json = entry(token.id, token.logprob);
    json["top_logprobs"] = OrderedJson::array();
    for (const TopToken& top : token.top) json["top_logprobs"].push_back(entry(top.id, top.logprob));
    content.push_back(std::move(json));
  }
  return {{"content", std::move(content)}};
}

class ChatAnswer final : public OpenAiAnswer {
 public:
  explicit ChatAnswer(AnswerContext context) : OpenAiAnswer(std::move(context)) {
    for (int i = 0; context_.stream && i < context_.choices; ++i) outputs_.emplace_back(context_.output);
  }

 protected:
  const char* object(bool stream) const override {
    return stream ? "chat.completion.chunk" : "chat.completion";
  }

  void open_choice(int choice) override {
    OrderedJson event = frame(true);
    event["choices"] = OrderedJson::array({{{"index", choice},
                                            {"delta", {{"role", "assistant"}, {"content", ""}}},
                                            {"logprobs", nullptr},
                                            {"finish_reason", nullptr}}});
    send(event);
  }

  std::vector<OrderedJson> stream_choices(const Piece& piece) override {
    ChatOutput& output = outputs_[static_cast<size_t>(piece.choice)];
    const bool last = piece.finish != engine::FinishReason::kNone;
    const ChatDelta delta = output.push(piece.text, piece.tokens, last);
    std::vector<OrderedJson> events;
    const auto add = [&](OrderedJson fields) {
      OrderedJson json;
      json["index"] = piece.choice;
      json["delta"] = OrderedJson{{"role", "assistant"}};
      json["delta"].update(fields);
      json["logprobs"] = nullptr;
      json["finish_reason"] = nullptr;
      events.push_back(std::move(json));
    };
    if (!delta.reasoning.empty()) add({{"reasoning_content", delta.reasoning}});
    if (!delta.content.empty()) add({{"content", delta.content}});
    for (const NumberedCall& call : delta.calls) {
      add({{"tool_calls",
            OrderedJson::array({{{"index", call.index},
                                 {"id", call.id},
                                 {"type", "function"},
                                 {"function", {{"name", call.call.name}}}}})}});
      add({{"tool_calls",
            OrderedJson::array({{{"index", call.index},
                                 {"function", {{"arguments", call.call.arguments}}}}})}});
    }
    if (events.empty() && (last || (context_.logprobs >= 0 && !piece.tokens.empty())))
      add({{"content", ""}});
    if (events.empty()) return events;
    if (context_.logprobs >= 0 && !piece.tokens.empty())
      events.front()["logprobs"] = logprobs_json(piece.tokens, *context_.text);
    if (last) events.back()["finish_reason"] = finish_of(piece.finish, output);
    return events;
  }

  OrderedJson whole_choice(int index, const Choice& choice) override {
    ChatOutput output(context_.output);
    const ChatDelta delta = output.push(choice.text, choice.tokens, true);
    OrderedJson message{{"role", "assistant"}};
    if (!delta.reasoning.empty()) message["reasoning_content"] = delta.reasoning;
    message["content"] = delta.content;
    message["tool_calls"] = OrderedJson::array();
    for (const NumberedCall& call : delta.calls)
      message["tool_calls"].push_back(
          {{"id", call.id},
           {"type", "function"},
           {"function", {{"name", call.call.name}, {"arguments", call.call.arguments}}}});
    reasoning_tokens_ += output.reasoning_tokens();
    OrderedJson json;
    json["index"] = index;
    json["message"] = std::move(message);
    json["logprobs"] = context_.logprobs < 0 ? OrderedJson(nullptr)
                                             : logprobs_json(choice.tokens, *context_.text);
    json["finish_reason"] = finish_of(choice.finish, output);
    if (context_.prompt_logprobs)
      json["prompt_logprobs"] = prompt_logprobs_json(choice.prompt, *context_.text);
    return json;
  }

  OrderedJson usage(const Usage& usage) const override {
    OrderedJson json = usage_json(usage);
    if (!context_.output.reasoning) return json;
    int64_t tokens = reasoning_tokens_;
    for (const ChatOutput& output : outputs_) tokens += output.reasoning_tokens();
    json["completion_tokens_details"] = OrderedJson{{"reasoning_tokens", tokens}};
    return json;
  }

 private:
  static OrderedJson finish_of(engine::FinishReason reason, const ChatOutput& output) {
    return output.any_call() && reason == engine::FinishReason::kStop ? OrderedJson("tool_calls")
                                                                      : finish_json(reason);
  }

  std::vector<ChatOutput> outputs_;  // by choice, when streaming
  int64_t reasoning_tokens_ = 0;     // when not
};

}  // namespace

ChatRequest parse_chat(std::string_view body, const ServiceOptions& options) {
  const json request = parse_body(body, options.max_json_depth);
  Fields fields(request);
  ChatRequest out;
  check_model(fields, options, "Model not found");

  const json* messages = fields.find("messages");
  if (messages == nullptr) throw Refused("Request param contains not messages or messages null");
  if (!messages->is_array() || messages->empty())
    throw Refused("Request param messages not arr or arr is empty");
  // The order of keys matters to a template that prints tools and calls as JSON.
  const OrderedJson ordered = OrderedJson::parse(body);
  const json* tools = fields.find("tools");
  const Offer offer = offered_tools(fields, tools);
  if (!offer.tools.empty()) {
    OrderedJson list = OrderedJson::array();
    for (const size_t i : offer.tools) list.push_back(ordered["tools"][i]);
    out.wishes.tools = out.wishes.chat.tools = dump(list);
    out.wishes.forced_call = offer.forced;
  }
  out.wishes.parallel_calls = fields.boolean("parallel_tool_calls").value_or(true);
  OrderedJson texts = OrderedJson::array();
  int64_t units = 0;
  for (size_t i = 0; i < messages->size(); ++i)
    texts.push_back(read_message((*messages)[i], ordered["messages"][i], i, tools != nullptr, &units));
  const int64_t most = options.max_request_mb * 1024 * 1024;
  if (units < 1 || units > most)
    throw Refused(fmt::format("Messages len not in (0, {}, but the length of inputs is {}", most, units));
  out.wishes.chat.messages = dump(texts);
  read_template_kwargs(fields, &out.wishes);
  if (const json* source = fields.find("chat_template")) {
    if (!source->is_string()) throw Refused("Parameter chat_template not string");
    out.wishes.chat.source = source->get<std::string>();
    if (out.wishes.chat.source.empty() || out.wishes.chat.source.size() > kMaxTemplateBytes)
      throw Refused("Parameter chat_template is not valid: expected 1 byte to 256 KB of template text");
    if (out.wishes.chat.source.find("{") == std::string::npos)
      throw Refused("Parameter chat_template is not valid: this server takes the text of a template, "
                    "not the path of a file");
  }
  out.fields = read_sampling(fields, kChat, options, body);
  if (out.wishes.forced_call && out.fields.grammar)
    throw Refused("tool_choice asks for a call and response_format for another structure; only one of "
                  "them can be");
  if (out.wishes.forced_call && out.fields.beam_search)
    throw Refused("use_beam_search cannot be combined with a tool_choice that forces a call");
  out.ignored = out.fields.ignored;
  const auto unread = fields.unread();
  out.ignored.insert(out.ignored.end(), unread.begin(), unread.end());
  return out;
}

std::unique_ptr<Answer> make_chat_answer(AnswerContext context) {
  return std::make_unique<ChatAnswer>(std::move(context));
}

}  // namespace phalanx::api
