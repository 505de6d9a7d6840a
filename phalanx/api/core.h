#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "phalanx/api/generate_service.h"
#include "phalanx/api/http_server.h"
#include "phalanx/api/metrics.h"
#include "phalanx/api/ports.h"
#include "phalanx/api/service.h"

namespace phalanx::api {

// What all routes of one instance share. Handlers hold it by shared_ptr.
struct Core {
  Core(ServiceOptions options, std::shared_ptr<EnginePort> engine,
       std::shared_ptr<const TextPort> text,
       std::function<InstanceHealth()> health, std::function<std::string()> status_json,
       std::function<void()> stop, bool monitor);
  ~Core();
  // Threads of this object end and the work queue closes. Handlers may still run. Idempotent.
  void shut_down();

  // Throws Refused unless inference may begin.
  void require_serving() const;
  // Runs `body` on a work thread; what it throws is answered on `responder`.
  void handle(const std::shared_ptr<Responder>& responder, std::function<void()> body) const;

  const ServiceOptions options;
  const std::shared_ptr<EnginePort> engine_owner;
  EnginePort& engine;
  const std::shared_ptr<const TextPort> text;
  const std::function<InstanceHealth()> health;
  const std::function<std::string()> status_json;
  const std::function<void()> stop;
  const bool monitor;                       // GET /metrics is on
  const int64_t started_at;                 // seconds since 1970
  const std::shared_ptr<WorkQueue> work = std::make_shared<WorkQueue>();
  Metrics metrics;
  GenerateService generate;
  std::atomic<bool> stopped{false};         // after GET /stopService
  std::atomic<uint64_t> next_id{0};         // endpoint_common_<n>
  std::jthread stopper;
  std::atomic<bool> profiling{false};       // GET /v1/profile is being answered
  std::jthread profiler;
};

// Answers with `refusal` of whatever is thrown; rethrows nothing.
void respond_to_exception(Responder& responder);

void mount_inference(const std::shared_ptr<Core>& core, Server& server);
void mount_management(const std::shared_ptr<Core>& core, Server& server);
void mount_adapters(const std::shared_ptr<Core>& core, Server& server);
void mount_models(const std::shared_ptr<Core>& core, Server& server);
void mount_metrics(const std::shared_ptr<Core>& core, Server& server);
// All of them, and the work queue.
void mount_all(const std::shared_ptr<Core>& core, Server& server);

}  // namespace phalanx::api
