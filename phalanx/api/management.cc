#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <nlohmann/json.hpp>

#include "phalanx/api/core.h"
#include "phalanx/api/page.h"
#include "phalanx/api/profile.h"
#include "phalanx/base/json.h"
#include "phalanx/base/log.h"

namespace phalanx::api {
namespace {

using OrderedJson = nlohmann::ordered_json;
using engine::EngineStats;

constexpr auto kDrainPoll = std::chrono::milliseconds(100);
// Between the answer of /stopService and the stop, so that the client gets the answer.
constexpr auto kAnswerPause = std::chrono::milliseconds(200);
constexpr int kMaxProbeSeconds = 600;
constexpr int kDefaultProbeSeconds = 10;

HttpResponse json_response(int status, const OrderedJson& json) {
  return {.status = status,
          .body = json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace),
          .headers = {}};
}

HttpResponse empty_response(int status) {
  return {.status = status, .content_type = "", .body = {}, .headers = {}};
}

OrderedJson abnormal_nodes(const InstanceHealth& health, const char* message) {
  OrderedJson nodes = OrderedJson::array();
  for (const auto& node : health.lost) nodes.push_back(fmt::format("node({}) is abnormal.", node));
  OrderedJson json{{"message", message}, {"no_contact_node", std::move(nodes)}};
  if (!health.reason.empty()) json["reason"] = health.reason;
  return json;
}

bool is_busy(const Core& core) {
  return core.engine.max_queue() > 0 && core.engine.stats().waiting >= core.engine.max_queue();
}

// The answer of the health routes; nothing when all is well.
std::optional<HttpResponse> unhealthy(const Core& core) {
  const InstanceHealth health = core.health();
  if (core.stopped || health.state == InstanceState::kDraining ||
      health.state == InstanceState::kStopped)
    return to_response(unavailable("The service has been stopped."));
  if (health.state == InstanceState::kStarting) return empty_response(503);
  if (health.state == InstanceState::kRecovering) return std::nullopt;  // live, not ready
  if (!health.lost.empty())
    return json_response(500, abnormal_nodes(health, "Abnormal node detected"));
  if (health.state == InstanceState::kFailed) {
    OrderedJson json{{"message", "Service is abnormal"}};
    if (!health.reason.empty()) json["reason"] = health.reason;
    return json_response(500, json);
  }
  return std::nullopt;
}

// What is lost while the group waits for it; nothing when nothing is.
std::optional<OrderedJson> recovering(const Core& core) {
  const InstanceHealth health = core.health();
  if (health.state != InstanceState::kRecovering) return std::nullopt;
  return abnormal_nodes(health, "Service is recovering");
}

HttpResponse live(const Core& core) {
  if (auto bad = unhealthy(core)) return *bad;
  if (const auto lost = recovering(core)) return json_response(200, *lost);
  if (is_busy(core)) return json_response(200, {{"message", "Service is alive but busy"}});
  return empty_response(200);
}

HttpResponse ready(const Core& core) {
  if (auto bad = unhealthy(core)) return *bad;
  if (const auto lost = recovering(core)) return json_response(503, *lost);
  if (is_busy(core))
    return json_response(
        503, {{"message", "Service is alive but busy. Consider reducing request frequency"}});
  return empty_response(200);
}

// "/v2/models/<m>/ready" and "/v2/models/<m>/getSlotCount".
HttpResponse model_route(const Core& core, const std::string& path) {
  const std::string rest = path.substr(std::string("/v2/models/").size());
  const size_t slash = rest.find('/');
  const std::string name = rest.substr(0, slash);
  const std::string verb = slash == std::string::npos ? "" : rest.substr(slash + 1);
  if (verb != "ready" && verb != "getSlotCount") return empty_response(404);
  if (!core.options.is_model(name))
    return to_response(not_found(fmt::format("Model {} not found.", name)));
  if (verb == "getSlotCount") {
    const EngineStats stats = core.engine.stats();
    return json_response(
        200, {{"total_slots", core.options.max_batch},
              {"free_slots", std::max<int64_t>(0, core.options.max_batch - stats.running)},
              {"available_tokens_length", stats.blocks_free * core.options.cache_block_size}});
  }
  HttpResponse response = ready(core);
  // Here the abnormal nodes stand as text inside the error.
  if (response.status == 500)
    return to_response({.status = 500, .error_type = "Incomplete Generation", .error = response.body});
  return response;
}

class ProbeAnswer final : public Answer {
 public:
  explicit ProbeAnswer(std::shared_ptr<Responder> responder) : responder_(std::move(responder)) {}
  void start() override {}
  void piece(const Piece&, const Usage&) override {}
  void finish(const Outcome&) override {
    responder_->respond(json_response(200, {{"status", "healthy"}}));
  }
  void fail(const Refusal& refusal) override {
    Refusal out = refusal;
    if (out.error.starts_with("Engine callback timeout")) {
      out.status = 500;  // here the limit is a probe's, and the instance has missed it
      out.error = "Engine callback timeout";
    }
    responder_->respond(to_response(out));
  }

 private:
  std::shared_ptr<Responder> responder_;
};

int probe_seconds(const std::string& path) {
  const std::string prefix = "/health/timed-";
  if (!path.starts_with(prefix)) return kDefaultProbeSeconds;
  const std::string digits = path.substr(prefix.size());
  if (digits.empty() || digits.size() > 3 ||
      !std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; }))
    throw Refused(not_found("Max wait time is 600, input is invalid or too long"));
  int seconds = 0;
  std::from_chars(digits.data(), digits.data() + digits.size(), seconds);
  if (seconds < 1 || seconds > kMaxProbeSeconds)
    throw Refused(not_found("Wait time should be in range of [1, 600], input is not valid"));
  return seconds;
}

// One token through the whole instance, within the given seconds.
void timed_health(Core& core, const std::string& path, const std::shared_ptr<Responder>& responder) {
  const int seconds = probe_seconds(path);
  if (core.stopped) return responder->respond(json_response(200, {{"status", "healthy"}}));
  if (const auto bad = unhealthy(core)) return responder->respond(*bad);
  GenerateSpec spec;
  spec.prompts.push_back({core.options.defaults.eos_token_ids.empty()
                              ? 0
                              : core.options.defaults.eos_token_ids.front()});
  spec.sampling.temperature = 0;
  spec.sampling.max_tokens = 1;
  spec.ignore_eos = true;
  spec.client_timeout_s = seconds;
  try {
    core.generate.start(std::move(spec), std::make_unique<ProbeAnswer>(responder), responder);
  } catch (const Refused& refused) {
    if (is_busy(core)) return responder->respond(json_response(200, {{"status", "healthy"}}));
    Refusal refusal = incomplete_generation("Failed to submit simulate request");
    refusal.error += std::string(". ") + refused.what();
    responder->respond(to_response(refusal));
  }
}

OrderedJson info_json(const Core& core) {
  const ServiceOptions& o = core.options;
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
          {"models", OrderedJson::array({std::move(model)})},
          {"max_input_length", o.max_input_tokens}};
}

OrderedJson config_json(const Core& core) {
  const ServiceOptions& o = core.options;
  return {{"modelName", o.model_name},       {"maxSeqLen", o.max_sequence},
          {"npuMemSize", o.npu_mem_size},    {"cpuMemSize", o.cpu_mem_size},
          {"worldSize", o.world_size},       {"maxOutputLen", o.max_output_tokens},
          {"cacheBlockSize", o.cache_block_size}};
}

OrderedJson status_json(const Core& core, bool second_version) {
  const EngineStats stats = core.engine.stats();
  const int64_t slots = std::max<int64_t>(0, core.options.max_batch - stats.running);
  OrderedJson json;
  json["service"] = {{"roleStatus", "RoleReady"}, {"currentRole", "none"}};
  json["resource"] = {{"availSlotsNum", slots},
                      {"availBlockNum", stats.blocks_free},
                      {"waitingRequestNum", stats.waiting},
                      {"runningRequestNum", stats.running},
                      {"swappedRequestNum", 0},
                      {"freeNpuBlockNums", stats.blocks_free},
                      {"freeCpuBlockNums", 0},
                      {"totalNpuBlockNums", stats.blocks_total},
                      {"totalCpuBlockNums", 0}};
  if (second_version) {
    json["resource"]["totalAvailNpuSlotsNum"] = slots;
    json["resource"]["totalAvailNpuBlockNum"] = stats.blocks_free;
    json["resource"]["dpInstMap"] =
        OrderedJson::array({OrderedJson::array({0, stats.blocks_free})});
    json["resource"]["maxAvailNpuBlockNum"] = stats.blocks_free;
  }
  json["linkStatus"] = {{"peers", OrderedJson::array()}};
  // What only Phalanx knows: ranks, layout, ledger.
  if (core.status_json) {
    const std::string own = core.status_json();
    if (!own.empty()) json["phalanx"] = OrderedJson::parse(own);
  }
  return json;
}

void stop_service(const std::shared_ptr<Core>& core, const std::string& query,
                  const std::shared_ptr<Responder>& responder) {
  if (core->stopped.exchange(true)) return responder->respond(empty_response(500));
  const bool force = query.find("mode=Force") != std::string::npos;
  log_info("Stop requested over HTTP{}", force ? ", at once" : ", after the requests in progress");
  core->stopper = std::jthread([c = core.get(), responder = std::shared_ptr<Responder>(responder),
                                force](const std::stop_token& stop) mutable {
    while (!force && !stop.stop_requested()) {
      const EngineStats stats = c->engine.stats();
      if (stats.running + stats.waiting + c->generate.active() == 0) break;
      std::this_thread::sleep_for(kDrainPoll);
    }
    responder->respond(empty_response(200));
    responder.reset();
    std::this_thread::sleep_for(kAnswerPause);
    if (c->stop) c->stop();
  });
}

}  // namespace

void mount_management(const std::shared_ptr<Core>& core, Server& server) {
  const auto get = [&](const char* path, std::function<HttpResponse(const HttpRequest&)> answer) {
    server.route(kManagement, "GET", path,
                 [core, answer = std::move(answer)](const HttpRequest& request,
                                                    const std::shared_ptr<Responder>& responder) {
                   responder->respond(answer(request));
                 });
  };
  const auto unless_stopped = [core](std::function<OrderedJson()> json) {
    return [core, json = std::move(json)](const HttpRequest&) {
      if (core->stopped) return to_response(unavailable("The service has been stopped."));
      return json_response(200, json());
    };
  };
  Core* c = core.get();
  mount_page(core, server);
  mount_profile(core, server);
  get("/v2/health/live", [c](const HttpRequest&) { return live(*c); });
  get("/v2/health/ready", [c](const HttpRequest&) { return ready(*c); });
  get("/health", [c](const HttpRequest&) { return live(*c); });
  get("/v2/models/*", [c](const HttpRequest& request) { return model_route(*c, request.path); });
  get("/info", unless_stopped([c] { return info_json(*c); }));
  get("/v1/config", [c](const HttpRequest&) { return json_response(200, config_json(*c)); });
  get("/v1/status", unless_stopped([c] { return status_json(*c, false); }));
  get("/v2/status", unless_stopped([c] { return status_json(*c, true); }));
  const Handler timed = [core](const HttpRequest& request,
                               const std::shared_ptr<Responder>& responder) {
    core->handle(responder, [core, path = request.path, responder] {
      timed_health(*core, path, responder);
    });
  };
  server.route(kManagement, "GET", "/health/timed", timed);
  server.route(kManagement, "GET", "/health/timed-*", timed);
  server.route(kManagement, "GET", "/stopService",
               [core](const HttpRequest& request, const std::shared_ptr<Responder>& responder) {
                 stop_service(core, request.query, responder);
               });
}

namespace {

// The instance's own account (ranks, certificates) as figures.
MetricsView metrics_view(const Core& core) {
  MetricsView view{.model_name = core.options.model_name, .engine = core.engine.stats()};
  if (!core.status_json) return view;
  const auto own = nlohmann::json::parse(core.status_json(), nullptr, false);
  if (!own.is_object()) return view;
  for (const auto& rank : own.value("ranks", nlohmann::json::array())) {
    if (!rank.is_object()) continue;
    const auto counter = [&](const char* name) { return rank.value(name, uint64_t{0}); };
    view.ranks.push_back({.rank = rank.value("rank", 0),
                          .node = rank.value("node", ""),
                          .compute_seconds = static_cast<double>(counter("compute_ns")) * 1e-9,
                          .communication_seconds = static_cast<double>(counter("transfer_ns")) * 1e-9,
                          .wait_seconds = static_cast<double>(counter("wait_ns")) * 1e-9,
                          .steps = counter("steps_done"),
                          .bytes_sent = counter("bytes_sent"),
                          .bytes_received = counter("bytes_received"),
                          .bytes_shared = counter("bytes_shared")});
  }
  for (const auto& node : own.value("nodes", nlohmann::json::array())) {
    if (!node.is_object()) continue;
    const std::string state = node.value("state", "");
    view.nodes.push_back({.address = node.value("address", ""),
                          .verdict = node.value("verdict", ""),
                          .up = state != "absent" && state != "lost"});
  }
  view.generation = own.value("generation", uint64_t{0});
  if (const auto recovery = own.find("recovery"); recovery != own.end() && recovery->is_object()) {
    view.recoveries = recovery->value("count", uint64_t{0});
    view.last_recovery_seconds = recovery->value("last_seconds", 0.0);
    view.recovering = !recovery->value("loss", "").empty();
  }
  for (const auto& certificate : own.value("certificates", nlohmann::json::array()))
    view.certificates.push_back(
        {certificate.value("plane", ""), certificate.value("not_after", int64_t{0})});
  return view;
}

// rest-api sheet, 3.2.
OrderedJson metrics_json(const Core& core, const std::string& instance) {
  const EngineStats stats = core.engine.stats();
  const Metrics::Averages averages = core.metrics.averages();
  OrderedJson result = OrderedJson::array();
  const auto add = [&](const char* name, double value) {
    result.push_back({{"metric", OrderedJson::array({OrderedJson{
                                     {"__name__", name}, {"job", "node"}, {"instance", instance}}})},
                      {"value", fmt::format("{:.6f}", value)}});
  };
  add("TTFT", averages.first_token_ms);
  add("TBT", averages.next_token_ms);
  add("waitingInferRequestNum", static_cast<double>(stats.waiting));
  add("processingInferRequestNum", static_cast<double>(stats.running));
  add("remainBlocks", static_cast<double>(stats.blocks_free));
  return {{"resultType", "vector"}, {"result", std::move(result)}};
}

}  // namespace

void mount_metrics(const std::shared_ptr<Core>& core, Server& server) {
  server.route(kManagement, "GET", "/metrics-json",
               [core](const HttpRequest& request, const std::shared_ptr<Responder>& responder) {
                 responder->respond(
                     json_response(200, metrics_json(*core, std::string(request.header("host")))));
               });
  server.route(kMetrics, "GET", "/metrics",
               [core](const HttpRequest&, const std::shared_ptr<Responder>& responder) {
                 const std::string type = "text/plain; charset=utf-8";
                 if (!core->monitor)
                   return responder->respond(
                       {.status = 500,
                        .content_type = type,
                        .body = "Environment variable MIES_SERVICE_MONITOR_MODE is not set.",
                        .headers = {}});
                 responder->respond(
                     {.status = 200,
                      .content_type = type,
                      .body = core->metrics.render(metrics_view(*core)),
                      .headers = {}});
               });
}

}  // namespace phalanx::api
