#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "phalanx/api/inference.h"
#include "phalanx/api/openai_answer.h"
#include "phalanx/api/refusal.h"

// vLLM's POST /generate. Reference: rest-api sheet, chapter 10.
namespace phalanx::api {
namespace {

using nlohmann::json;

struct VllmPrompt {
  std::string echo;  // what the answer repeats
  std::string text;  // what the model reads
};

VllmPrompt read_prompt(Fields& fields, const ServiceOptions& options) {
  const json* prompt = fields.find("prompt");
  if (prompt == nullptr) throw Refused("Contains not prompt or prompt null");
  VllmPrompt out;
  if (prompt->is_string()) {
    out.echo = out.text = prompt->get<std::string>();
  } else if (prompt->is_array()) {
    if (prompt->empty()) throw Refused("Prompt array cannot be empty.");
    bool first = true;
    for (const json& part : *prompt) {
      if (!part.is_object() || part.value("type", json()) != "text" || !part.contains("text") ||
          !part["text"].is_string())
        throw Refused("The type of prompt is abnormal: this model takes parts of type text only");
      if (std::exchange(first, false)) out.echo = part["text"].get<std::string>();
      out.text += part["text"].get_ref<const std::string&>();
    }
  } else {
    throw Refused("The type of prompt is abnormal,prompt must be str or integer list.");
  }
  const int64_t units = utf16_units(out.text);
  const int64_t most = options.max_request_mb * 1024 * 1024;
  if (units < 1 || units > most)
    throw Refused(fmt::format("Prompt len not in (0, {}], but the length of inputs is {}", most, units));
  return out;
}

class VllmAnswer final : public Answer {
 public:
  VllmAnswer(std::shared_ptr<Responder> responder, std::string echo, bool stream, bool full_text,
             int sequences, std::vector<std::pair<std::string, std::string>> headers)
      : responder_(std::move(responder)),
        echo_(std::move(echo)),
        stream_(stream),
        full_text_(full_text),
        headers_(std::move(headers)),
        texts_(static_cast<size_t>(sequences)) {}

  void start() override {
    if (!stream_) return;
    started_ = true;
    responder_->start_stream(200, "text/event-stream", headers_);
  }
  void piece(const Piece& piece, const Usage&) override {
    std::string& text = texts_[static_cast<size_t>(piece.choice)];
    text += piece.text;
    if (!stream_) return;
    const bool last = piece.finish != engine::FinishReason::kNone;
    OrderedJson texts = OrderedJson::array();
    for (size_t i = 0; i < texts_.size(); ++i) texts.push_back("");
    texts[static_cast<size_t>(piece.choice)] = last && full_text_ ? text : piece.text;
    std::string chunk = dump({{"text", std::move(texts)}});
    chunk += '\0';
    responder_->write(std::move(chunk));
  }
  void finish(const Outcome& outcome) override {
    if (stream_) return responder_->end();
    OrderedJson texts = OrderedJson::array();
    for (const size_t i : choice_order(outcome, static_cast<int>(texts_.size())))
      texts.push_back(echo_ + " " + texts_[i]);
    responder_->respond({.body = dump({{"text", std::move(texts)}}), .headers = headers_});
  }
  void fail(const Refusal& refusal) override {
    if (!started_) return responder_->respond(to_response(refusal));
    std::string chunk = to_json(refusal);
    chunk += '\0';
    responder_->write(std::move(chunk));
    responder_->end();
  }

 private:
  std::shared_ptr<Responder> responder_;
  std::string echo_;
  bool stream_, full_text_;
  bool started_ = false;
  std::vector<std::pair<std::string, std::string>> headers_;
  std::vector<std::string> texts_;
};

// `model` names an adapter here.
void check_adapter(Fields& fields, const ServiceOptions& options) {
  const json* model = fields.find("model");
  if (model == nullptr) return;
  if (!model->is_string()) throw Refused("Request param model must be string");
  const auto& name = model->get_ref<const std::string&>();
  const int64_t units = utf16_units(name);
  if (units < 1 || units > 256)
    throw Refused("Request param model must have 1 to 256 characters");
  if (!options.is_model(name) && !options.is_adapter(name) && name != "None")
    throw Refused(not_found(fmt::format("Model {} not found.", name)));
}

}  // namespace

void vllm_generate(InferenceCall& call) {
  const ServiceOptions& options = call.core.options;
  const json request = parse_body(call.request.body, options.max_json_depth);
  Fields fields(request);
  check_adapter(fields, options);
  const VllmPrompt prompt = read_prompt(fields, options);
  SamplingFields sampling = read_sampling(fields, kVllm, options, call.request.body);
  std::vector<std::string> ignored = sampling.ignored;
  for (const std::string& name : fields.unread()) ignored.push_back(name);
  GenerateSpec spec = spec_of(call, sampling);
  spec.prompts.push_back(prompt_ids(call, prompt.text));
  auto answer = std::make_unique<VllmAnswer>(call.responder, prompt.echo, sampling.stream,
                                             options.full_text, sampling.sequences,
                                             ignored_headers(ignored));
  call.core.generate.start(std::move(spec), std::move(answer), call.responder);
}

}  // namespace phalanx::api
