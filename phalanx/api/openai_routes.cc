#include <fmt/format.h>

#include <algorithm>
#include <ctime>

#include "phalanx/api/inference.h"
#include "phalanx/api/refusal.h"

namespace phalanx::api {
namespace {

AnswerContext context_of(InferenceCall& call, const SamplingFields& fields, size_t prompts,
                         const std::vector<std::string>& ignored) {
  AnswerContext context;
  context.responder = call.responder;
  context.text = call.core.text;
  context.id = request_id(call);
  context.model = answering_model(call, fields);
  context.created = static_cast<int64_t>(std::time(nullptr));
  context.stream = fields.stream;
  context.include_usage = fields.include_usage;
  context.continuous_usage = fields.continuous_usage;
  context.full_text = fields.stream && call.core.options.full_text;
  context.logprobs = fields.sampling.logprobs;
  context.prompt_logprobs = fields.sampling.prompt_logprobs >= 0;
  context.sequences = fields.sequences;
  context.beams = fields.beam_search;
  context.choices = static_cast<int>(prompts) * fields.sequences;
  context.headers = ignored_headers(ignored);
  return context;
}

void chat(InferenceCall& call) {
  const ChatRequest chat = parse_chat(call.request.body, call.core.options);
  PreparedChat prepared = prepare_chat(call, chat.fields, chat.wishes);
  AnswerContext context = context_of(call, chat.fields, 1, chat.ignored);
  context.output = std::move(prepared.output);
  call.core.generate.start(std::move(prepared.spec), make_chat_answer(std::move(context)),
                           call.responder);
}

void complete(InferenceCall& call) {
  Core& core = call.core;
  CompletionRequest completion = parse_completion(call.request.body, core.options);
  AnswerContext context =
      context_of(call, completion.fields, completion.prompts.size(), completion.ignored);
  GenerateSpec spec = spec_of(call, completion.fields);
  const bool scored = completion.echo && completion.fields.logprobs;
  if (scored)
    spec.sampling.prompt_logprobs =
        std::max(spec.sampling.prompt_logprobs, completion.fields.sampling.logprobs);
  for (auto& prompt : completion.prompts) {
    const auto* text = std::get_if<std::string>(&prompt);
    std::vector<int32_t> ids =
        text != nullptr ? core.text->encode(*text, true) : std::get<std::vector<int32_t>>(prompt);
    core.generate.check_prompt(&ids);
    if (completion.echo)
      context.echo.push_back(text != nullptr ? *text : core.text->decode(ids, spec.skip_special));
    if (scored) context.echo_ids.push_back(ids);
    spec.prompts.push_back(std::move(ids));
  }
  core.generate.start(std::move(spec), make_completion_answer(std::move(context)), call.responder);
}

}  // namespace

void mount_openai(const std::shared_ptr<Core>& core, Server& server) {
  server.route(kBusiness, "POST", "/v1/chat/completions", inference_handler(core, chat));
  server.route(kManagement, "POST", "/chat", inference_handler(core, chat));  // of the page
  server.route(kBusiness, "POST", "/v1/completions", inference_handler(core, complete));
}

}  // namespace phalanx::api
