#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "phalanx/api/chat_output.h"
#include "phalanx/api/generate_service.h"
#include "phalanx/api/ports.h"
#include "phalanx/api/sampling_fields.h"

// The OpenAI dialect: bodies into plain structs, results into bodies. Knows no engine.
namespace phalanx::api {

// What a chat asks for beside sampling; also what the other dialects of chat are turned into.
struct ChatWishes {
  ChatText chat;
  std::string tools;                  // offered ones, as a JSON array; empty: none
  bool forced_call = false;           // tool_choice: required, or a name
  bool parallel_calls = true;
  bool thinking_known = false;        // the request says whether to think
  bool thinking = false;
  int64_t thinking_budget = -1;
};

struct ChatRequest {
  SamplingFields fields;
  ChatWishes wishes;
  std::vector<std::string> ignored;  // names of fields without effect
};
// Throws Refused.
[[nodiscard]] ChatRequest parse_chat(std::string_view body, const ServiceOptions& options);

struct CompletionRequest {
  SamplingFields fields;
  std::vector<std::variant<std::string, std::vector<int32_t>>> prompts;
  bool echo = false;
  std::vector<std::string> ignored;
};
[[nodiscard]] CompletionRequest parse_completion(std::string_view body, const ServiceOptions& options);

// What an answer needs beside the pieces.
struct AnswerContext {
  std::shared_ptr<Responder> responder;
  std::shared_ptr<const TextPort> text;
  std::string id;
  std::string model;
  int64_t created = 0;               // seconds since 1970
  bool stream = false, include_usage = false, continuous_usage = false;
  bool full_text = false;            // fullTextEnabled: the last event of a stream has all of it
  int32_t logprobs = -1;             // as in SamplingParams
  bool prompt_logprobs = false;      // asked for by this name
  std::vector<std::vector<int32_t>> echo_ids;  // by prompt; with echo and logprobs
  int sequences = 1;                 // per prompt
  int choices = 1;
  bool beams = false;
  std::vector<std::string> echo;     // by prompt; empty without echo
  OutputFormat output;
  std::vector<std::pair<std::string, std::string>> headers;
};
[[nodiscard]] std::unique_ptr<Answer> make_chat_answer(AnswerContext context);
[[nodiscard]] std::unique_ptr<Answer> make_completion_answer(AnswerContext context);

}  // namespace phalanx::api
