#include "phalanx/engine/submission.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <random>
#include <utility>

#include "phalanx/base/clock.h"

namespace phalanx::engine {

namespace {

// What is wrong with the values, or nothing.
std::optional<std::string> check_sampling(const SamplingParams& p) {
  const auto wrong = [](const char* name, auto found, const char* expected) {
    return fmt::format("{} is {}, expected {}", name, found, expected);
  };
  if (!(p.temperature >= 0 && std::isfinite(p.temperature)))
    return wrong("temperature", p.temperature, "a number of 0 or more");
  if (p.top_k < -1) return wrong("top_k", p.top_k, "-1 or 0 (off) or more");
  if (!(p.top_p > 0 && p.top_p <= 1)) return wrong("top_p", p.top_p, "more than 0, at most 1");
  if (!(p.min_p >= 0 && p.min_p <= 1)) return wrong("min_p", p.min_p, "0 to 1");
  if (!(p.repetition_penalty > 0 && std::isfinite(p.repetition_penalty)))
    return wrong("repetition_penalty", p.repetition_penalty, "a number above 0");
  if (!std::isfinite(p.presence_penalty))
    return wrong("presence_penalty", p.presence_penalty, "a finite number");
  if (!std::isfinite(p.frequency_penalty))
    return wrong("frequency_penalty", p.frequency_penalty, "a finite number");
  if (p.max_tokens < 1) return wrong("max_tokens", p.max_tokens, "1 or more");
  if (p.min_tokens < 0) return wrong("min_tokens", p.min_tokens, "0 or more");
  for (const auto& [id, bias] : p.logit_bias)
    if (!std::isfinite(bias)) return wrong("logit_bias", bias, "a finite number");
  return std::nullopt;
}

bool has_penalty(const SamplingParams& p) {
  return p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
}

Submission refused(SubmitResult result, std::string detail) {
  return {.result = result, .detail = std::move(detail), .sequence = nullptr};
}

}  // namespace

Submission make_sequence(GenerateRequest request, std::shared_ptr<EventSink> sink,
                         const EngineOptions& o) {
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  if (prompt == 0) {
    return refused(SubmitResult::kBadParameter, "the prompt has 0 tokens, at least 1 is needed");
  }
  const int64_t slots = o.blocks * o.block_size;
  if (prompt > o.max_input_tokens) {
    return refused(SubmitResult::kPromptTooLong,
                  fmt::format("the prompt has {} tokens, at most {} are allowed "
                              "(maxInputTokenLen)",
                              prompt, o.max_input_tokens));
  }
  if (prompt > o.max_sequence - 1) {
    return refused(SubmitResult::kPromptTooLong,
                  fmt::format("the prompt has {} tokens, at most {} leave room for one more in a "
                              "sequence of {} (maxSeqLen)",
                              prompt, o.max_sequence - 1, o.max_sequence));
  }
  if (prompt > slots) {
    return refused(SubmitResult::kPromptTooLong,
                  fmt::format("the prompt has {} tokens, the whole KV cache holds {} ({} blocks of "
                              "{})",
                              prompt, slots, o.blocks, o.block_size));
  }
  for (size_t i = 0; i < request.prompt.size(); ++i) {
    if (request.prompt[i] >= 0 && request.prompt[i] < o.vocab_size) continue;
    return refused(SubmitResult::kBadToken,
                  fmt::format("token {} of the prompt is {}, the vocabulary has ids 0 to {}", i,
                              request.prompt[i], o.vocab_size - 1));
  }
  if (auto wrong = check_sampling(request.sampling)) {
    return refused(SubmitResult::kBadParameter, std::move(*wrong));
  }

  auto sequence = std::make_unique<Sequence>();
  sequence->params = std::move(request.sampling);
  const SamplingParams& params = sequence->params;
  const int64_t outputs =
      std::min({int64_t{params.max_tokens}, o.max_output_tokens, o.max_sequence - prompt,
                slots + 1 - prompt});  // the last token needs no slot
  sequence->id = std::move(request.id);
  sequence->sink = std::move(sink);
  sequence->prompt_count = static_cast<int32_t>(prompt);
  sequence->max_outputs = static_cast<int32_t>(outputs);
  sequence->tokens = std::move(request.prompt);
  sequence->tokens.reserve(static_cast<size_t>(prompt + outputs));
  sequence->blocks.reserve(
      static_cast<size_t>((prompt + outputs + o.block_size - 1) / o.block_size));
  sequence->submitted_ns = now_ns();
  sequence->priority = sequence->level = request.priority;
  sequence->client = std::move(request.client);
  sequence->draft_limit = static_cast<int32_t>(o.draft_tokens);
  sequence->draft.reserve(static_cast<size_t>(o.draft_tokens));
  sequence->reuse_prefix = params.prompt_logprobs < 0;
  if (params.seed) {
    sequence->seed = *params.seed;
  } else {
    std::random_device device;
    sequence->seed = uint64_t{device()} << 32 | device();
  }
  if (has_penalty(params)) {
    sequence->counts.emplace(o.vocab_size, prompt + outputs);
    for (const int32_t token : sequence->tokens) sequence->counts->add_prompt(token);
  }
  return {.result = SubmitResult::kAccepted, .detail = {}, .sequence = std::move(sequence)};
}

}  // namespace phalanx::engine
