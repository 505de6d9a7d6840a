#include "phalanx/api/core.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "phalanx/api/refusal.h"
#include "phalanx/base/error.h"
#include "phalanx/base/log.h"

namespace phalanx::api {
namespace {

size_t average_window() {
  constexpr size_t kUsual = 1000;
  const char* text = std::getenv("DYNAMIC_AVERAGE_WINDOW_SIZE");
  if (text == nullptr) return kUsual;
  const long size = std::strtol(text, nullptr, 10);
  return size >= 1 && size <= 100000 ? static_cast<size_t>(size) : kUsual;
}

ServiceOptions with_adapters(ServiceOptions options, std::shared_ptr<EnginePort> engine) {
  options.knows_adapter = [engine = std::move(engine)](std::string_view name) {
    const auto adapters = engine->adapters();
    return std::any_of(adapters.begin(), adapters.end(),
                       [&](const auto& adapter) { return adapter.name == name; });
  };
  return options;
}

}  // namespace

Core::Core(ServiceOptions service_options, std::shared_ptr<EnginePort> engine_port,
           std::shared_ptr<const TextPort> text_port, std::function<InstanceHealth()> health_call,
           std::function<std::string()> status_call, std::function<void()> stop_call, bool monitored)
    : options(with_adapters(std::move(service_options), engine_port)),
      engine_owner(std::move(engine_port)),
      engine(*engine_owner),
      text(std::move(text_port)),
      health(std::move(health_call)),
      status_json(std::move(status_call)),
      stop(std::move(stop_call)),
      monitor(monitored),
      started_at(std::chrono::duration_cast<std::chrono::seconds>(
                     std::chrono::system_clock::now().time_since_epoch())
                     .count()),
      metrics(average_window()),
      generate(options, engine, text, work, metrics) {}

Core::~Core() { shut_down(); }

void Core::shut_down() {
  generate.stop();
  work->close();
  stopper.request_stop();
  if (stopper.joinable()) stopper.join();
  profiler.request_stop();
  if (profiler.joinable()) profiler.join();
}

void Core::require_serving() const {
  if (stopped) throw Refused(unavailable("The service has been stopped"));
  const InstanceHealth now = health();
  switch (now.state) {
    case InstanceState::kServing:
    case InstanceState::kRecovering:
      return;
    case InstanceState::kStarting:
      throw Refused(unavailable("The service is starting", 1));
    case InstanceState::kDraining:
    case InstanceState::kStopped:
      throw Refused(unavailable("The service has been stopped", 5));
    case InstanceState::kFailed:
      throw Refused(unavailable("The service is not healthy. " + now.reason));
  }
}

void Core::handle(const std::shared_ptr<Responder>& responder, std::function<void()> body) const {
  work->post([responder, body = std::move(body)] {
    try {
      body();
    } catch (...) {
      respond_to_exception(*responder);
    }
  });
}

void respond_to_exception(Responder& responder) {
  try {
    throw;
  } catch (const Refused& refused) {
    responder.respond(to_response(refused.refusal()));
  } catch (const Error& error) {
    if (error.code() == Code::kInvalidArgument || error.code() == Code::kFailedPrecondition)
      return responder.respond(to_response(
          {.status = 422, .error_type = "Input Validation Error", .error = error.what()}));
    log_error("Request failed: {}", error.what());
    responder.respond(to_response(incomplete_generation(error.what())));
  } catch (const std::exception& error) {
    log_error("Request failed: {}", error.what());
    responder.respond({.status = 500, .content_type = "text/plain", .body = "Server internal error",
                       .headers = {}});
  }
}

void mount_all(const std::shared_ptr<Core>& core, Server& server) {
  core->work->open(&server);
  mount_inference(core, server);
  mount_models(core, server);
  mount_management(core, server);
  mount_adapters(core, server);
  mount_metrics(core, server);
}

}  // namespace phalanx::api
