#pragma once

#include <optional>
#include <string>
#include <vector>

#include "phalanx/api/fields.h"
#include "phalanx/api/service.h"
#include "phalanx/engine/request.h"

namespace phalanx::api {

// What an OpenAI request (chat or completions) says about sampling, with the model's defaults filled
// in. Reference: rest-api sheet, chapter 6.
struct SamplingFields {
  engine::SamplingParams sampling;      // stop_token_ids without the model's own
  std::vector<std::string> stops;
  bool include_stop = false;
  bool skip_special = true;
  bool ignore_eos = false;
  bool stream = false;
  bool include_usage = false;           // stream_options.include_usage
  int sequences = 1;                    // returned per prompt
  bool logprobs = false;
};

enum class OpenAiDialect { kChat, kCompletions };

// Throws Refused with the texts of the sheet.
[[nodiscard]] SamplingFields read_sampling(Fields& fields, OpenAiDialect dialect,
                                           const ServiceOptions& options);

// `model`: present, a string, not empty; `unknown` is the message for another name than ours.
void check_model(Fields& fields, const ServiceOptions& options, const std::string& unknown);

// `response_format`: text, or refused.
void check_response_format(Fields& fields);

}  // namespace phalanx::api
