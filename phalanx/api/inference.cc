#include "phalanx/api/inference.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "phalanx/api/refusal.h"
#include "phalanx/base/error.h"
#include "phalanx/text/call_syntax.h"

namespace phalanx::api {
namespace {

using OrderedJson = nlohmann::ordered_json;

constexpr size_t kMaxIdBytes = 256;
constexpr const char* kThinkStart = "<think>";
constexpr const char* kThinkEnd = "</think>";

// Gives the bodies of refusals another shape.
class ShapingResponder final : public Responder {
 public:
  ShapingResponder(std::shared_ptr<Responder> inner, ErrorShape shape)
      : inner_(std::move(inner)), shape_(shape) {}
  void respond(HttpResponse response) override {
    if (response.status >= 400) {
      const auto body = OrderedJson::parse(response.body, nullptr, false);
      const bool known = body.is_object() && body.contains("error") && body["error"].is_string();
      response.body = shape_(response.status, known ? body["error"].get<std::string>() : response.body,
                             known ? body.value("error_type", "") : "");
      response.content_type = "application/json";
    }
    inner_->respond(std::move(response));
  }
  void start_stream(int status, std::string content_type,
                    std::vector<std::pair<std::string, std::string>> headers) override {
    inner_->start_stream(status, std::move(content_type), std::move(headers));
  }
  void write(std::string bytes) override { inner_->write(std::move(bytes)); }
  void end() override { inner_->end(); }
  void on_disconnect(std::function<void()> callback) override {
    inner_->on_disconnect(std::move(callback));
  }

 private:
  std::shared_ptr<Responder> inner_;
  ErrorShape shape_;
};

std::unique_ptr<text::GrammarWalker> compile(const Core& core, const text::GrammarSpec& spec) {
  try {
    return core.text->compile(spec);
  } catch (const Error& error) {
    if (error.code() != Code::kInvalidArgument) throw;
    throw Refused(error.what());
  }
}

// One guide per sequence, each from a copy of what was compiled once.
void add_guide(const Core& core, GenerateSpec* spec, GuideOptions options,
               std::unique_ptr<text::GrammarWalker> compiled) {
  options.vocab_size = core.options.vocab_size;
  std::shared_ptr<text::GrammarWalker> walker = std::move(compiled);
  spec->make_guide = [options, walker, threads = core.generate.guide_threads()] {
    return make_guide(options, walker ? walker->clone() : nullptr, threads);
  };
}

// A list of calls of the offered functions, each with arguments after its schema.
text::GrammarSpec call_grammar(const std::string& tools, bool parallel) {
  OrderedJson calls = OrderedJson::array();
  for (const auto& tool : OrderedJson::parse(tools)) {
    const auto& function = tool["function"];
    OrderedJson parameters = OrderedJson{{"type", "object"}};
    if (const auto found = function.find("parameters"); found != function.end() && found->is_object())
      parameters = *found;
    calls.push_back({{"type", "object"},
                     {"properties", {{"name", {{"const", function["name"]}}}, {"parameters", parameters}}},
                     {"required", {"name", "parameters"}},
                     {"additionalProperties", false}});
  }
  OrderedJson schema{{"type", "array"}, {"minItems", 1}, {"items", {{"anyOf", std::move(calls)}}}};
  schema["maxItems"] = parallel ? 16 : 1;
  return {.kind = text::GrammarSpec::Kind::kJsonSchema, .text = schema.dump()};
}

// Whether the answer begins with reasoning: what the end of the prompt shows, else what the request
// says, else what families do by themselves.
bool will_think(const Core& core, const ChatWishes& wishes, std::string_view prompt) {
  const std::string_view end = text::syntax::trimmed_right(prompt);
  if (end.ends_with(kThinkStart)) return true;
  if (end.ends_with(kThinkEnd)) return false;
  if (wishes.thinking_known) return wishes.thinking;
  if (core.options.thinks) return *core.options.thinks;
  return core.options.model_type.starts_with("qwen3") || core.options.model_type == "deepseek_v3";
}

}  // namespace

Handler inference_handler(const std::shared_ptr<Core>& core, InferenceRoute route, ErrorShape shape) {
  return [core, route = std::move(route), shape](HttpRequest request,
                                                 std::shared_ptr<Responder> responder) {
    const auto received = Clock::now();
    auto shared = std::make_shared<const HttpRequest>(std::move(request));
    if (shape != nullptr) responder = std::make_shared<ShapingResponder>(std::move(responder), shape);
    core->handle(responder, [core, route, received, shared, responder] {
      core->require_serving();
      InferenceCall call{*core, *shared, received, responder};
      route(call);
    });
  };
}

std::string request_id(InferenceCall& call, std::string_view prefix) {
  const std::string_view own = call.request.header("req-id");
  if (!own.empty() && own.size() <= kMaxIdBytes) return std::string(own);
  return fmt::format("{}{}", prefix, call.core.next_id.fetch_add(1));
}

std::vector<std::pair<std::string, std::string>> ignored_headers(
    const std::vector<std::string>& ignored) {
  if (ignored.empty()) return {};
  return {{"X-Phalanx-Ignored", ignored_header(ignored)}};
}

const std::string& answering_model(const InferenceCall& call, const SamplingFields& fields) {
  return fields.adapter.empty() ? call.core.options.model_name : fields.adapter;
}

GenerateSpec spec_of(InferenceCall& call, const SamplingFields& fields) {
  GenerateSpec spec;
  spec.sequences = fields.sequences;
  spec.sampling = fields.sampling;
  spec.stops = fields.stops;
  spec.include_stop = fields.include_stop;
  spec.skip_special = fields.skip_special;
  spec.ignore_eos = fields.ignore_eos;
  spec.stream = fields.stream;
  spec.client_timeout_s = fields.timeout_s;
  spec.priority = fields.priority;
  spec.adapter = fields.adapter;
  // A key's name, else the address without the port.
  const HttpRequest& request = call.request;
  spec.client = !request.user.empty() ? request.user : request.peer.substr(0, request.peer.rfind(':'));
  spec.received = call.received;
  spec.beam_width = fields.beam_search ? fields.beam_width : 0;
  spec.length_penalty = fields.length_penalty;
  if (fields.grammar) add_guide(call.core, &spec, {}, compile(call.core, *fields.grammar));
  return spec;
}

std::vector<int32_t> prompt_ids(InferenceCall& call, std::string_view text,
                                std::optional<int64_t> truncate) {
  std::vector<int32_t> ids = call.core.text->encode(text, true);
  if (truncate && std::ssize(ids) > *truncate) ids.erase(ids.begin(), ids.end() - *truncate);
  call.core.generate.check_prompt(&ids);
  return ids;
}

PreparedChat prepare_chat(InferenceCall& call, const SamplingFields& fields, const ChatWishes& wishes) {
  Core& core = call.core;
  const ServiceOptions& options = core.options;
  if (!core.text->has_chat_template() && wishes.chat.source.empty())
    throw Refused(fmt::format("Model {} has no chat template, so it cannot serve {}. Use "
                              "/v1/completions, or add chat_template.jinja to {}",
                              options.model_name, call.request.path, options.model_path));
  ChatText chat_text = wishes.chat;
  if (!wishes.thinking_known && options.thinks) {
    auto kwargs = chat_text.kwargs.empty() ? OrderedJson::object() : OrderedJson::parse(chat_text.kwargs);
    kwargs["enable_thinking"] = *options.thinks;
    chat_text.kwargs = kwargs.dump();
  }
  const std::string prompt = core.text->render_chat(chat_text);
  std::vector<int32_t> ids = core.text->encode(prompt, false);
  core.generate.check_prompt(&ids);

  SamplingFields plain = fields;
  const std::optional<text::GrammarSpec> grammar =
      wishes.forced_call ? call_grammar(wishes.tools, wishes.parallel_calls) : fields.grammar;
  plain.grammar.reset();
  PreparedChat chat{.spec = spec_of(call, plain), .output = {}};
  chat.spec.prompts.push_back(std::move(ids));

  OutputFormat& output = chat.output;
  const bool thinks = will_think(core, wishes, prompt);
  output.reasoning = options.enable_reasoning && thinks;
  output.reasoning_start = kThinkStart;
  output.reasoning_end = kThinkEnd;
  if (thinks) output.reasoning_end_ids = core.text->encode(kThinkEnd, false);
  output.tools = wishes.tools;
  output.parallel = wishes.parallel_calls;
  if (wishes.forced_call)
    output.calls = text::CallFormat::kJsonList;
  else if (!wishes.tools.empty())
    output.calls = text::call_format(options.call_format)
                       .value_or(text::default_call_format(options.model_type));
  // The marks of calls and of reasoning may be special tokens.
  if (output.calls != text::CallFormat::kNone || output.reasoning) chat.spec.skip_special = false;
  chat.spec.want_tokens = output.reasoning;

  const bool budget = wishes.thinking_budget >= 0 && thinks;
  if (grammar || budget)
    add_guide(core, &chat.spec,
              {.reasoning = budget || (grammar && output.reasoning),
               .reasoning_end = output.reasoning_end_ids,
               .reasoning_budget = budget ? wishes.thinking_budget : -1},
              grammar ? compile(core, *grammar) : nullptr);
  return chat;
}

void mount_inference(const std::shared_ptr<Core>& core, Server& server) {
  mount_openai(core, server);
  mount_responses(core, server);
  mount_messages(core, server);
  mount_generate(core, server);
  mount_native(core, server);
  mount_triton(core, server);
  mount_tokenizer(core, server);
  mount_openapi(core, server);
}

}  // namespace phalanx::api
