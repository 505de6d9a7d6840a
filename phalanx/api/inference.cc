#include <fmt/format.h>

#include <ctime>

#include "phalanx/api/core.h"
#include "phalanx/api/fields.h"
#include "phalanx/api/openai.h"

namespace phalanx::api {
namespace {

constexpr size_t kMaxIdBytes = 256;

// The request's own name, if it is one, else our count.
std::string request_id(Core& core, const HttpRequest& request) {
  const std::string_view own = request.header("req-id");
  if (!own.empty() && own.size() <= kMaxIdBytes) return std::string(own);
  return fmt::format("endpoint_common_{}", core.next_id.fetch_add(1));
}

GenerateSpec spec_of(SamplingFields fields, Clock::time_point received) {
  GenerateSpec spec;
  spec.sequences = fields.sequences;
  spec.sampling = std::move(fields.sampling);
  spec.stops = std::move(fields.stops);
  spec.include_stop = fields.include_stop;
  spec.skip_special = fields.skip_special;
  spec.ignore_eos = fields.ignore_eos;
  spec.stream = fields.stream;
  spec.received = received;
  return spec;
}

AnswerContext context_of(Core& core, const HttpRequest& request, const SamplingFields& fields,
                         size_t prompts, const std::vector<std::string>& ignored,
                         const std::shared_ptr<Responder>& responder) {
  AnswerContext context;
  context.responder = responder;
  context.text = core.text;
  context.id = request_id(core, request);
  context.model = core.options.model_name;
  context.created = static_cast<int64_t>(std::time(nullptr));
  context.stream = fields.stream;
  context.include_usage = fields.include_usage;
  context.logprobs = fields.sampling.logprobs;
  context.sequences = fields.sequences;
  context.choices = static_cast<int>(prompts) * fields.sequences;
  if (!ignored.empty()) context.headers.emplace_back("X-Phalanx-Ignored", ignored_header(ignored));
  return context;
}

void chat(Core& core, const HttpRequest& request, Clock::time_point received,
          const std::shared_ptr<Responder>& responder) {
  ChatRequest chat = parse_chat(request.body, core.options);
  if (!core.text->has_chat_template())
    throw Refused(fmt::format("Model {} has no chat template, so it cannot serve /v1/chat/completions. "
                              "Use /v1/completions, or add chat_template.jinja to {}",
                              core.options.model_name, core.options.model_path));
  std::vector<int32_t> ids = core.text->encode(core.text->render_chat(chat.chat), false);
  core.generate.check_prompt(&ids);
  auto answer = make_chat_answer(context_of(core, request, chat.fields, 1, chat.ignored, responder));
  GenerateSpec spec = spec_of(std::move(chat.fields), received);
  spec.prompts.push_back(std::move(ids));
  core.generate.start(std::move(spec), std::move(answer), responder);
}

void complete(Core& core, const HttpRequest& request, Clock::time_point received,
              const std::shared_ptr<Responder>& responder) {
  CompletionRequest completion = parse_completion(request.body, core.options);
  AnswerContext context = context_of(core, request, completion.fields, completion.prompts.size(),
                                     completion.ignored, responder);
  GenerateSpec spec = spec_of(std::move(completion.fields), received);
  for (auto& prompt : completion.prompts) {
    const auto* text = std::get_if<std::string>(&prompt);
    std::vector<int32_t> ids =
        text != nullptr ? core.text->encode(*text, true) : std::get<std::vector<int32_t>>(prompt);
    core.generate.check_prompt(&ids);
    if (completion.echo)
      context.echo.push_back(text != nullptr ? *text : core.text->decode(ids, spec.skip_special));
    spec.prompts.push_back(std::move(ids));
  }
  core.generate.start(std::move(spec), make_completion_answer(std::move(context)), responder);
}

using Route = void (*)(Core&, const HttpRequest&, Clock::time_point, const std::shared_ptr<Responder>&);

Handler on_work_thread(const std::shared_ptr<Core>& core, Route route) {
  return [core, route](HttpRequest request, std::shared_ptr<Responder> responder) {
    const auto received = Clock::now();
    auto shared = std::make_shared<const HttpRequest>(std::move(request));
    core->handle(responder, [core, route, received, shared, responder] {
      core->require_serving();
      route(*core, *shared, received, responder);
    });
  };
}

}  // namespace

void mount_inference(const std::shared_ptr<Core>& core, Server& server) {
  server.route(kBusiness, "POST", "/v1/chat/completions", on_work_thread(core, chat));
  server.route(kBusiness, "POST", "/v1/completions", on_work_thread(core, complete));
}

}  // namespace phalanx::api
