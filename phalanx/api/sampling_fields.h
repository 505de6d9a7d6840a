#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/api/field_rules.h"
#include "phalanx/api/fields.h"
#include "phalanx/api/service.h"
#include "phalanx/engine/request.h"
#include "phalanx/text/grammar.h"

namespace phalanx::api {

// What a request of any dialect says about sampling and control, with the model's defaults filled in.
// Reference: rest-api sheet, chapter 6.
struct SamplingFields {
  engine::SamplingParams sampling;      // stop_token_ids without the model's own; no guide yet
  std::vector<std::string> stops;
  bool include_stop = false;
  bool skip_special = true;
  bool ignore_eos = false;
  bool stream = false;
  bool include_usage = false;           // stream_options.include_usage
  bool continuous_usage = false;        // stream_options.continuous_usage_stats: usage in every event
  int sequences = 1;                    // returned per prompt
  bool logprobs = false;
  bool echo = false;                    // kCompletions
  bool beam_search = false;
  int beam_width = 0;                   // beams followed; best_of, else n
  double length_penalty = 1;            // of beam search
  std::string adapter;                  // name of a LoRA adapter: `model`, or TGI's adapter_id; empty: none
  int32_t priority = 5;
  std::optional<double> timeout_s;
  bool details = false;                 // kTgi, kNative, kTritonText, kTritonTokens
  bool decoder_input_details = false;   // kTgi
  bool return_full_text = false;        // kTgi
  std::optional<int64_t> truncate;      // kTgi: keep the last tokens of the prompt
  std::optional<text::GrammarSpec> grammar;  // structured output
  std::vector<std::string> ignored;     // read, but without effect
};

// `fields` is the object that holds the parameters of `interface`, within the request `body`; `stream`
// tells what the route says where the field does not exist. Throws Refused with the texts of the sheet.
[[nodiscard]] SamplingFields read_sampling(Fields& fields, Interface interface,
                                           const ServiceOptions& options, std::string_view body,
                                           bool stream = false);

// `model`: present, a string, not empty; `unknown` is the message for another name than ours and our
// adapters'.
void check_model(Fields& fields, const ServiceOptions& options, const std::string& unknown);

}  // namespace phalanx::api
