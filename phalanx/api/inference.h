#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "phalanx/api/core.h"
#include "phalanx/api/openai.h"

// What the inference routes of all dialects share: from a parsed request to a running generation.
namespace phalanx::api {

// One request on a work thread.
struct InferenceCall {
  Core& core;
  const HttpRequest& request;
  Clock::time_point received;
  const std::shared_ptr<Responder>& responder;
};
// What it throws is answered.
using InferenceRoute = std::function<void(InferenceCall&)>;

// Rewrites a refusal's body ({"error", "error_type"}) into a dialect's own.
using ErrorShape = std::string (*)(int status, const std::string& error, const std::string& type);

// The handler of a route: checks that the instance serves, runs `route` on a work thread, answers what
// it throws in `shape` (null: as it is).
[[nodiscard]] Handler inference_handler(const std::shared_ptr<Core>& core, InferenceRoute route,
                                        ErrorShape shape = nullptr);

// The request's own name (header req-id), else <prefix><count>.
[[nodiscard]] std::string request_id(InferenceCall& call, std::string_view prefix = "endpoint_common_");

// X-Phalanx-Ignored, if there is something to say.
[[nodiscard]] std::vector<std::pair<std::string, std::string>> ignored_headers(
    const std::vector<std::string>& ignored);

// What an answer calls the model: the adapter's name, else the model's.
[[nodiscard]] const std::string& answering_model(const InferenceCall& call,
                                                 const SamplingFields& fields);

// A generation without prompts; with `fields.grammar` its tokens follow it. Throws Refused for a
// grammar that cannot be used.
[[nodiscard]] GenerateSpec spec_of(InferenceCall& call, const SamplingFields& fields);

// Renders and tokenises a chat, sets up what its answer must follow and how it is taken apart.
// Throws Refused.
struct PreparedChat {
  GenerateSpec spec;
  OutputFormat output;
};
[[nodiscard]] PreparedChat prepare_chat(InferenceCall& call, const SamplingFields& fields,
                                        const ChatWishes& wishes);

// The ids of a text prompt, checked. `truncate`: keep the last ones.
[[nodiscard]] std::vector<int32_t> prompt_ids(InferenceCall& call, std::string_view text,
                                              std::optional<int64_t> truncate = std::nullopt);

// Each in its dialect's file.
void mount_openai(const std::shared_ptr<Core>& core, Server& server);
void mount_responses(const std::shared_ptr<Core>& core, Server& server);
void mount_messages(const std::shared_ptr<Core>& core, Server& server);
void mount_generate(const std::shared_ptr<Core>& core, Server& server);  // vLLM and TGI share /generate
void mount_native(const std::shared_ptr<Core>& core, Server& server);
void mount_triton(const std::shared_ptr<Core>& core, Server& server);
void mount_tokenizer(const std::shared_ptr<Core>& core, Server& server);
void mount_openapi(const std::shared_ptr<Core>& core, Server& server);

// /generate by what its body has.
void vllm_generate(InferenceCall& call);
void tgi_generate(InferenceCall& call, bool stream_route, bool in_array);

}  // namespace phalanx::api
