#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "phalanx/api/inference.h"
#include "phalanx/api/input_fields.h"
#include "phalanx/api/openai_answer.h"
#include "phalanx/api/refusal.h"

// text-generation-inference: POST /, /generate, /generate_stream, GET /info. Reference: rest-api sheet,
// chapters 2.1 and 11.
namespace phalanx::api {
namespace {

using nlohmann::json;

OrderedJson token_json(int32_t id) {
  return {{"id", id}, {"logprob", nullptr}, {"special", nullptr}, {"text", nullptr}};
}

const char* finish_word(engine::FinishReason reason) {
  if (reason == engine::FinishReason::kLength) return "length";
  return reason == engine::FinishReason::kStop ? "eos_token" : "stop_sequence";
}

struct TgiShape {
  bool stream = false, array = false;
  bool details = false, prefill = false;
  std::string before;  // return_full_text: the prompt and a space
  std::vector<int32_t> prompt;
  uint64_t seed = 0;
};

class TgiAnswer final : public Answer {
 public:
  TgiAnswer(std::shared_ptr<Responder> responder, TgiShape shape,
            std::vector<std::pair<std::string, std::string>> headers)
      : responder_(std::move(responder)), shape_(std::move(shape)), headers_(std::move(headers)) {}

  void start() override {
    if (!shape_.stream) return;
    started_ = true;
    responder_->start_stream(200, "text/event-stream", headers_);
  }

  void piece(const Piece& piece, const Usage& usage) override {
    const bool last = piece.finish != engine::FinishReason::kNone;
    text_ += piece.text;
    OrderedJson ids = OrderedJson::array();
    for (const TokenPiece& token : piece.tokens) {
      ids.push_back(token.id);
      ids_.push_back(token.id);
    }
    finish_ = piece.finish;
    if (!shape_.stream) return;
    OrderedJson event;
    event["token"] = OrderedJson{
        {"id", std::move(ids)}, {"text", piece.text}, {"logprob", nullptr}, {"special", nullptr}};
    event["generated_text"] = nullptr;
    event["details"] = nullptr;
    if (last) event["generated_text"] = shape_.before + text_;
    if (last && shape_.details) event["details"] = details(usage);
    responder_->write("data: " + dump(event) + "\n\n");
  }

  void finish(const Outcome& outcome) override {
    if (shape_.stream) return responder_->end();
    OrderedJson body;
    if (shape_.details || shape_.prefill) {
      OrderedJson all = details(outcome.usage);
      all["prefill"] = OrderedJson::array();
      if (shape_.prefill)
        for (const int32_t id : shape_.prompt) all["prefill"].push_back(token_json(id));
      all["tokens"] = OrderedJson::array();
      for (const int32_t id : ids_) all["tokens"].push_back(token_json(id));
      body["details"] = std::move(all);
    }
    body["generated_text"] = shape_.before + text_;
    if (shape_.array) body = OrderedJson::array({body});
    responder_->respond({.body = dump(body), .headers = headers_});
  }

  void fail(const Refusal& refusal) override {
    if (!started_) return responder_->respond(to_response(refusal));
    responder_->write("data: " + to_json(refusal) + "\n\n");
    responder_->end();
  }

 private:
  [[nodiscard]] OrderedJson details(const Usage& usage) const {
    return {{"prompt_tokens", usage.prompt_tokens},
            {"finish_reason", finish_word(finish_)},
            {"generated_tokens", usage.completion_tokens},
            {"seed", shape_.seed}};
  }

  std::shared_ptr<Responder> responder_;
  TgiShape shape_;
  std::vector<std::pair<std::string, std::string>> headers_;
  bool started_ = false;
  std::string text_;
  std::vector<int32_t> ids_;
  engine::FinishReason finish_ = engine::FinishReason::kNone;
};

OrderedJson info_json(const ServiceOptions& o) {
  OrderedJson model{{"model_device_type", "cpu"},
                    {"model_dtype", o.model_dtype},
                    {"model_id", o.model_name},
                    {"model_pipeline_tag", "text-generation"},
                    {"model_sha", nullptr},
                    {"max_total_tokens", o.max_sequence}};
  return {{"docker_label", nullptr},
          {"max_batch_total_tokens", o.max_prefill_tokens},
          {"max_best_of", 1},
          {"max_concurrent_requests", o.max_batch},
          {"max_stop_sequences", nullptr},
          {"max_waiting_tokens", nullptr},
          {"sha", nullptr},
          {"validation_workers", nullptr},
          {"version", "1.0.0"},
          {"waiting_served_ratio", nullptr},
          {"model_id", o.model_name},
          {"model_dtype", o.model_dtype},
          {"models", OrderedJson::array({std::move(model)})},
          {"max_input_length", o.max_input_tokens}};
}

}  // namespace

void tgi_generate(InferenceCall& call, bool stream_route, bool in_array) {
  const ServiceOptions& options = call.core.options;
  const json request = parse_body(call.request.body, options.max_json_depth);
  Fields fields(request);
  const std::string input = read_text_input(fields, "inputs", options);
  bool stream = stream_route;
  if (in_array) {
    const json* wanted = fields.find("stream");
    if (wanted != nullptr && !wanted->is_boolean()) throw Refused("Stream must be boolean type.");
    stream = wanted != nullptr && wanted->get<bool>();
  }
  Fields parameters(read_parameters(fields));
  SamplingFields sampling = read_sampling(parameters, kTgi, options, call.request.body, stream);
  std::vector<std::string> ignored = sampling.ignored;
  for (const std::string& name : fields.unread()) ignored.push_back(name);
  for (const std::string& name : parameters.unread()) ignored.push_back("parameters." + name);

  GenerateSpec spec = spec_of(call, sampling);
  spec.want_tokens = true;
  spec.prompts.push_back(prompt_ids(call, input, sampling.truncate));
  TgiShape shape{.stream = sampling.stream,
                 .array = in_array,
                 .details = sampling.details,
                 .prefill = sampling.decoder_input_details,
                 .before = sampling.return_full_text ? input + " " : "",
                 .prompt = sampling.decoder_input_details ? spec.prompts[0] : std::vector<int32_t>(),
                 .seed = sampling.sampling.seed.value_or(0)};
  auto answer = std::make_unique<TgiAnswer>(call.responder, std::move(shape), ignored_headers(ignored));
  call.core.generate.start(std::move(spec), std::move(answer), call.responder);
}

void mount_generate(const std::shared_ptr<Core>& core, Server& server) {
  server.route(kBusiness, "POST", "/generate", inference_handler(core, [](InferenceCall& call) {
                 const json body = json::parse(call.request.body, nullptr, false);
                 if (body.is_object() && body.contains("prompt") && !body["prompt"].is_null())
                   return vllm_generate(call);
                 if (body.is_object() && body.contains("inputs")) return tgi_generate(call, false, false);
                 throw Refused(R"({"error":"inputs or prompt is necessary in the request body"})");
               }));
  server.route(kBusiness, "POST", "/generate_stream", inference_handler(core, [](InferenceCall& call) {
                 tgi_generate(call, true, false);
               }));
  server.route(kBusiness, "POST", "/", inference_handler(core, [](InferenceCall& call) {
                 tgi_generate(call, false, true);
               }));
  // The clients of TGI ask for it where they ask for text.
  server.route(kBusiness, "GET", "/info",
               [core](const HttpRequest&, const std::shared_ptr<Responder>& responder) {
                 if (core->stopped)
                   return responder->respond(to_response(unavailable("The service has been stopped.")));
                 responder->respond({.body = dump(info_json(core->options)), .headers = {}});
               });
}

}  // namespace phalanx::api
