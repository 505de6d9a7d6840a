#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "phalanx/api/inference.h"
#include "phalanx/api/input_fields.h"
#include "phalanx/api/openai_answer.h"
#include "phalanx/api/refusal.h"
#include "phalanx/api/step_times.h"

// Triton: /v2/models/<model>/generate, generate_stream, infer, stopInfer and metadata. Reference:
// rest-api sheet, chapters 4 and 13.
namespace phalanx::api {
namespace {

using nlohmann::json;
using Headers = std::vector<std::pair<std::string, std::string>>;

const char* finish_word(engine::FinishReason reason) {
  if (reason == engine::FinishReason::kLength) return "length";
  return reason == engine::FinishReason::kStop ? "eos_token" : "stop_sequence";
}

// ^[a-zA-Z0-9_-]{1,256}$; absent: "".
std::string read_id(Fields& fields) {
  const json* id = fields.find("id");
  if (id == nullptr) return {};
  if (!id->is_string()) throw Refused("id must be string type.");
  const auto& text = id->get_ref<const std::string&>();
  const bool fits = !text.empty() && text.size() <= 256 && std::all_of(text.begin(), text.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '-';
  });
  if (!fits) throw Refused("id must match ^[a-zA-Z0-9_-]{1,256}$.");
  return text;
}

class TritonTextAnswer final : public Answer {
 public:
  struct Shape {
    std::string id, model;
    bool stream = false, details = false;
  };
  TritonTextAnswer(InferenceCall& call, Shape shape, Headers headers)
      : responder_(call.responder),
        engine_(call.core.engine),
        shape_(std::move(shape)),
        headers_(std::move(headers)),
        times_(call.received) {}

  void start() override {
    if (!shape_.stream) return;
    started_ = true;
    responder_->start_stream(200, "text/event-stream", headers_);
  }
  void piece(const Piece& piece, const Usage& usage) override {
    text_ += piece.text;
    finish_ = piece.finish;
    const int64_t batch = std::max<int64_t>(1, engine_.stats().running);
    const StepTimes::Step step = times_.next();
    batches_.push_back(batch);
    (step.first ? first_ms_ : decode_ms_) += step.ms;
    if (!shape_.stream) return;
    OrderedJson event = frame(piece.text);
    if (shape_.details) {
      OrderedJson details;
      const bool last = finish_ != engine::FinishReason::kNone;
      details["finish_reason"] = last ? OrderedJson(finish_word(finish_)) : OrderedJson(nullptr);
      details["generated_tokens"] = usage.completion_tokens;
      details["first_token_cost"] = nullptr;
      details["decode_cost"] = nullptr;
      details["batch_size"] = batch;
      details["queue_wait_time"] = step.first ? usage.queue_ms : 0;
      event["details"] = std::move(details);
      event["prefill_time"] = step.first ? OrderedJson(step.ms) : OrderedJson(nullptr);
      event["decode_time"] = step.first ? OrderedJson(nullptr) : OrderedJson(step.ms);
    }
    responder_->write("data:" + dump(event) + "\n\n");
  }
  void finish(const Outcome& outcome) override {
    if (shape_.stream) return responder_->end();
    OrderedJson body = frame(text_);
    if (shape_.details) {
      OrderedJson details;
      details["finish_reason"] = finish_word(finish_);
      details["generated_tokens"] = outcome.usage.completion_tokens;
      details["first_token_cost"] = first_ms_;
      details["decode_cost"] = decode_ms_;
      details["batch_size"] = batches_;
      std::vector<int64_t> waits(batches_.size(), 0);  // by token: only the first one waits
      if (!waits.empty()) waits.front() = outcome.usage.queue_ms;
      details["queue_wait_time"] = waits;
      body["details"] = std::move(details);
    }
    responder_->respond({.body = dump(body), .headers = headers_});
  }
  void fail(const Refusal& refusal) override {
    if (!started_) return responder_->respond(to_response(refusal));
    responder_->write("data:" + to_json(refusal) + "\n\n");
    responder_->end();
  }

 private:
  [[nodiscard]] OrderedJson frame(const std::string& text) const {
    return {{"id", shape_.id},
            {"model_name", shape_.model},
            {"model_version", nullptr},
            {"text_output", text}};
  }

  std::shared_ptr<Responder> responder_;
  EnginePort& engine_;
  Shape shape_;
  Headers headers_;
  StepTimes times_;
  bool started_ = false;
  std::string text_;
  std::vector<int64_t> batches_;
  int64_t first_ms_ = 0, decode_ms_ = 0;
  engine::FinishReason finish_ = engine::FinishReason::kNone;
};

class TritonTokenAnswer final : public Answer {
 public:
  TritonTokenAnswer(std::shared_ptr<Responder> responder, std::string id, std::string model,
                    std::string output, Headers headers)
      : responder_(std::move(responder)),
        id_(std::move(id)),
        model_(std::move(model)),
        output_(std::move(output)),
        headers_(std::move(headers)) {}
  void start() override {}
  void piece(const Piece& piece, const Usage&) override {
    for (const TokenPiece& token : piece.tokens) ids_.push_back(token.id);
  }
  void finish(const Outcome&) override {
    OrderedJson output{{"name", output_},
                       {"shape", {1, ids_.size()}},
                       {"datatype", "UINT32"},
                       {"data", ids_}};
    const OrderedJson body{{"id", id_},
                           {"model_name", model_},
                           {"outputs", OrderedJson::array({std::move(output)})}};
    responder_->respond({.body = dump(body), .headers = headers_});
  }
  void fail(const Refusal& refusal) override { responder_->respond(to_response(refusal)); }

 private:
  std::shared_ptr<Responder> responder_;
  std::string id_, model_, output_;
  Headers headers_;
  std::vector<int32_t> ids_;
};

void generate_text(InferenceCall& call, bool stream) {
  const ServiceOptions& options = call.core.options;
  const json request = parse_body(call.request.body, options.max_json_depth);
  Fields fields(request);
  const std::string id = read_id(fields);
  const std::string input = read_text_input(fields, "text_input", options);
  Fields parameters(read_parameters(fields));
  SamplingFields sampling = read_sampling(parameters, kTritonText, options, call.request.body, stream);
  std::vector<std::string> ignored = sampling.ignored;
  for (const std::string& name : fields.unread()) ignored.push_back(name);
  for (const std::string& name : parameters.unread()) ignored.push_back("parameters." + name);
  GenerateSpec spec = spec_of(call, sampling);
  spec.name = id;
  spec.prompts.push_back(prompt_ids(call, input));
  auto answer = std::make_unique<TritonTextAnswer>(
      call,
      TritonTextAnswer::Shape{.id = id,
                              .model = options.model_name,
                              .stream = sampling.stream,
                              .details = sampling.details},
      ignored_headers(ignored));
  call.core.generate.start(std::move(spec), std::move(answer), call.responder);
}

// inputs[0]: its ids; its parameters are left in `parameters`.
std::vector<int32_t> read_tensor(Fields& fields, const json** parameters, std::vector<std::string>* ignored) {
  static const json kNone = json::object();
  const json* inputs = fields.find("inputs");
  if (inputs == nullptr || !inputs->is_array()) throw Refused("inputs must be array type.");
  if (inputs->size() != 1) throw Refused("Inputs count must be 1.");
  const json& input = inputs->front();
  if (!input.is_object()) throw Refused("inputs[0] must be object type.");
  Fields tensor(input);
  const json* name = tensor.find("name");
  if (name == nullptr || !name->is_string() || name->get_ref<const std::string&>().empty())
    throw Refused("Inputs name must be non-empty string.");
  const json* shape = tensor.find("shape");
  if (shape == nullptr || !shape->is_array() || shape->empty() || shape->size() > 2)
    throw Refused("Inputs shape must be [n] or [1,n].");
  for (const json& n : *shape)
    if (!n.is_number_unsigned()) throw Refused("Inputs shape must be [n] or [1,n].");
  if (shape->size() == 2 && shape->front() != 1) throw Refused("Inputs shape must be [n] or [1,n].");
  const json* datatype = tensor.find("datatype");
  if (datatype == nullptr || *datatype != "UINT32")
    throw Refused(fmt::format("Unsupported datatype, got {}.",
                              datatype == nullptr            ? "none"
                              : datatype->is_string() ? datatype->get<std::string>()
                                                      : datatype->dump()));
  const json* data = tensor.find("data");
  if (data == nullptr) throw Refused("Not found inputs[0].data.");
  // A client may nest the data as the shape has it.
  const bool nested = data->is_array() && data->size() == 1 && data->front().is_array();
  const json& flat = nested ? data->front() : *data;
  const auto count = shape->back().get<uint64_t>();
  if (flat.is_array() && flat.size() != count)
    throw Refused(fmt::format("Data size should be {}, got {}.", count, flat.size()));
  std::vector<int32_t> ids = read_id_input(flat, "data");
  const json* own = tensor.find("parameters");
  if (own != nullptr && !own->is_object()) throw Refused("parameters must be object type.");
  *parameters = own != nullptr ? own : &kNone;
  for (const std::string& unread : tensor.unread()) ignored->push_back("inputs[0]." + unread);
  return ids;
}

void infer_tokens(InferenceCall& call) {
  const ServiceOptions& options = call.core.options;
  const json request = parse_body(call.request.body, options.max_json_depth);
  Fields fields(request);
  const std::string id = read_id(fields);
  const json* inner = nullptr;
  std::vector<std::string> ignored;
  std::vector<int32_t> ids = read_tensor(fields, &inner, &ignored);
  const json* outputs = fields.find("outputs");
  std::string output = "output0";
  if (outputs != nullptr) {
    if (!outputs->is_array()) throw Refused("outputs must be array type.");
    if (outputs->size() != 1)
      throw Refused(fmt::format("Outputs size should be 1, got {}.", outputs->size()));
    const json& only = outputs->front();
    const bool named = only.is_object() && only.contains("name") && only["name"].is_string() &&
                       !only["name"].get_ref<const std::string&>().empty();
    if (!named) throw Refused("Outputs name must be non-empty string.");
    output = only["name"].get<std::string>();
  }
  Fields parameters(*inner);
  SamplingFields sampling = read_sampling(parameters, kTritonTokens, options, call.request.body, false);
  ignored.insert(ignored.end(), sampling.ignored.begin(), sampling.ignored.end());
  for (const std::string& name : fields.unread()) ignored.push_back(name);
  for (const std::string& name : parameters.unread()) ignored.push_back("inputs[0].parameters." + name);
  call.core.generate.check_prompt(&ids);
  GenerateSpec spec = spec_of(call, sampling);
  spec.name = id;
  spec.want_tokens = true;
  spec.prompts.push_back(std::move(ids));
  auto answer = std::make_unique<TritonTokenAnswer>(call.responder, id, options.model_name, output,
                                                    ignored_headers(ignored));
  call.core.generate.start(std::move(spec), std::move(answer), call.responder);
}

void stop_infer(InferenceCall& call) {
  const json request = parse_body(call.request.body, call.core.options.max_json_depth);
  Fields fields(request);
  const std::string id = read_id(fields);
  if (id.empty()) throw Refused("Not found id.");
  if (!call.core.generate.stop_named(id))
    throw Refused(not_found(fmt::format("RequestId is {} not found.", id)));
  call.responder->respond({.body = call.request.body, .headers = {}});
}

// The model's name in /v2/models/<model>/<action>.
std::pair<std::string, std::string> split_path(std::string_view path) {
  path.remove_prefix(std::min(path.size(), std::string_view("/v2/models/").size()));
  const size_t slash = path.find('/');
  if (slash == std::string_view::npos) return {std::string(path), {}};
  return {std::string(path.substr(0, slash)), std::string(path.substr(slash + 1))};
}

void post_model(InferenceCall& call) {
  const auto [model, action] = split_path(call.request.path);
  if (!call.core.options.is_model(model))
    throw Refused(not_found(fmt::format("Model {} not found.", model)));
  if (action == "generate") return generate_text(call, false);
  if (action == "generate_stream") return generate_text(call, true);
  if (action == "infer") return infer_tokens(call);
  if (action == "stopInfer") return stop_infer(call);
  call.responder->respond({.status = 404, .content_type = "", .body = "", .headers = {}});
}

OrderedJson tensor_metadata(const char* name) {
  return {{"name", name}, {"shape", {-1}}, {"datatype", "UINT32"}};
}

}  // namespace

void mount_triton(const std::shared_ptr<Core>& core, Server& server) {
  const auto json_route = [&](const std::string& path, OrderedJson body) {
    server.route(kBusiness, "GET", path,
                 [text = dump(body)](const HttpRequest&, const std::shared_ptr<Responder>& responder) {
                   responder->respond({.body = text, .headers = {}});
                 });
  };
  const ServiceOptions& o = core->options;
  json_route("/v2", {{"name", "MindIE Server"},
                     {"version", "1.0.0"},
                     {"extensions",
                      {{"max_iter_times", o.max_output_tokens},
                       {"prefill_policy_type", 0},
                       {"decode_policy_type", 0},
                       {"max_prefill_batch_size", o.max_prefill_batch},
                       {"max_prefill_tokens", o.max_prefill_tokens}}}});
  const std::string own = "/v2/models/" + o.model_name;
  json_route(own, {{"name", o.model_name},
                   {"platform", "MindIE Server"},
                   {"inputs", OrderedJson::array({tensor_metadata("input0")})},
                   {"outputs", OrderedJson::array({tensor_metadata("output0")})}});
  json_route(own + "/config",
             {{"model_name", o.model_name},
              {"input_datatype", "INT64"},
              {"output_datatype", "INT64"},
              {"max_seq_len", o.max_sequence},
              {"npu_mem_size", o.npu_mem_size},
              {"cpu_mem_size", o.cpu_mem_size},
              {"world_size", o.world_size},
              {"model_weight_path", o.model_path.substr(o.model_path.find_last_of('/') + 1)},
              {"model_instance_type", "Standard"}});
  server.route(kBusiness, "POST", "/v2/models/*", inference_handler(core, post_model));
}

}  // namespace phalanx::api
