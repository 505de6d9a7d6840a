#include <nlohmann/json.hpp>

#include "phalanx/api/inference.h"
#include "phalanx/api/input_fields.h"
#include "phalanx/api/openai_answer.h"
#include "phalanx/api/refusal.h"
#include "phalanx/api/step_times.h"

// The original's own POST /infer and /infer_token. Reference: rest-api sheet, chapter 12.
namespace phalanx::api {
namespace {

using nlohmann::json;

const char* finish_word(engine::FinishReason reason) {
  if (reason == engine::FinishReason::kLength) return "length";
  return reason == engine::FinishReason::kStop ? "eos_token" : "stop_sequence";
}

class NativeAnswer final : public Answer {
 public:
  NativeAnswer(std::shared_ptr<Responder> responder, bool stream, bool details, uint64_t seed,
               Clock::time_point received, std::vector<std::pair<std::string, std::string>> headers)
      : responder_(std::move(responder)),
        stream_(stream),
        details_(details),
        seed_(seed),
        times_(received),
        headers_(std::move(headers)) {}

  void start() override {
    if (!stream_) return;
    started_ = true;
    responder_->start_stream(200, "text/event-stream", headers_);
  }
  void piece(const Piece& piece, const Usage& usage) override {
    const bool last = piece.finish != engine::FinishReason::kNone;
    text_ += piece.text;
    finish_ = piece.finish;
    OrderedJson ids = OrderedJson::array();
    for (const TokenPiece& token : piece.tokens) {
      ids.push_back(token.id);
      ids_.push_back(token.id);
    }
    if (!stream_) return;
    const StepTimes::Step step = times_.next();
    OrderedJson event;
    event["prefill_time"] = step.first ? OrderedJson(step.ms) : OrderedJson(nullptr);
    event["decode_time"] = step.first ? OrderedJson(nullptr) : OrderedJson(step.ms);
    if (last) {
      event["generated_text"] = text_;
      event["details"] = details_ ? details(usage) : OrderedJson(nullptr);
    }
    event["token"] = OrderedJson{{"id", std::move(ids)},
                                 {"text", last ? OrderedJson(nullptr) : OrderedJson(piece.text)}};
    responder_->write("data: " + dump(event) + "\n\n");
  }
  void finish(const Outcome& outcome) override {
    if (stream_) return responder_->end();
    OrderedJson body{{"generated_text", text_}};
    if (details_) body["details"] = details(outcome.usage);
    responder_->respond({.body = dump(body), .headers = headers_});
  }
  void fail(const Refusal& refusal) override {
    if (!started_) return responder_->respond(to_response(refusal));
    responder_->write("data: " + to_json(refusal) + "\n\n");
    responder_->end();
  }

 private:
  [[nodiscard]] OrderedJson details(const Usage& usage) const {
    OrderedJson json{{"finish_reason", finish_word(finish_)},
                     {"generated_tokens", usage.completion_tokens}};
    if (!stream_) json["generated_token_ids"] = ids_;
    json["seed"] = seed_;
    return json;
  }

  std::shared_ptr<Responder> responder_;
  bool stream_, details_;
  uint64_t seed_;
  StepTimes times_;
  std::vector<std::pair<std::string, std::string>> headers_;
  bool started_ = false;
  std::string text_;
  std::vector<int32_t> ids_;
  engine::FinishReason finish_ = engine::FinishReason::kNone;
};

void infer(InferenceCall& call) {
  const ServiceOptions& options = call.core.options;
  const json request = parse_body(call.request.body, options.max_json_depth);
  Fields fields(request);
  const json* ids = fields.find("input_id");
  const json* text = fields.find("inputs");
  if (ids != nullptr && text != nullptr) throw Refused("Input conflict.");
  if (ids == nullptr && text == nullptr) throw Refused("Not found inputs.");
  const json* wanted = fields.find("stream");
  if (wanted != nullptr && !wanted->is_boolean()) throw Refused("stream must be boolean type.");
  const bool stream = wanted != nullptr && wanted->get<bool>();
  std::vector<int32_t> prompt;
  std::string input;
  if (ids != nullptr) prompt = read_id_input(*ids, "input_id");
  else input = read_text_input(fields, "inputs", options);
  Fields parameters(read_parameters(fields));
  SamplingFields sampling = read_sampling(parameters, kNative, options, call.request.body, stream);
  std::vector<std::string> ignored = sampling.ignored;
  for (const std::string& name : fields.unread()) ignored.push_back(name);
  for (const std::string& name : parameters.unread()) ignored.push_back("parameters." + name);
  if (ids != nullptr) call.core.generate.check_prompt(&prompt);
  else prompt = prompt_ids(call, input);

  GenerateSpec spec = spec_of(call, sampling);
  spec.want_tokens = true;
  spec.prompts.push_back(std::move(prompt));
  auto answer = std::make_unique<NativeAnswer>(call.responder, sampling.stream, sampling.details,
                                               sampling.sampling.seed.value_or(0), call.received,
                                               ignored_headers(ignored));
  call.core.generate.start(std::move(spec), std::move(answer), call.responder);
}

}  // namespace

void mount_native(const std::shared_ptr<Core>& core, Server& server) {
  for (const char* path : {"/infer", "/infer_token"})
    server.route(kBusiness, "POST", path, inference_handler(core, infer));
}

}  // namespace phalanx::api
