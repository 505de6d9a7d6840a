#include "phalanx/api/profile.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>
#include <string_view>

#include "phalanx/base/clock.h"

namespace phalanx::api {
namespace {

using OrderedJson = nlohmann::ordered_json;
using engine::CollectiveTrace;
using engine::StepTrace;

constexpr int64_t kDefaultSteps = 20;
constexpr int64_t kDefaultSeconds = 30;
constexpr int64_t kMaxSeconds = 600;
constexpr auto kPoll = std::chrono::milliseconds(20);
constexpr int kHead = 0;  // process ids of the trace; rank r is r + 1

double us_of_ns(int64_t ns) { return static_cast<double>(ns) * 1e-3; }
double us_of_ticks(uint64_t ticks) {
  return static_cast<double>(ticks) * static_cast<double>(engine::kTraceTickNs) * 1e-3;
}

class Events {
 public:
  void name(int process, const std::string& name) {
    events_.push_back({{"ph", "M"}, {"pid", process}, {"name", "process_name"}, {"args", {{"name", name}}}});
  }
  void slice(int process, const char* name, double begin_us, double length_us,
             OrderedJson args = OrderedJson::object()) {
    OrderedJson event{{"ph", "X"}, {"pid", process}, {"tid", 0},
                      {"ts", begin_us}, {"dur", length_us}, {"name", name}};
    if (!args.empty()) event["args"] = std::move(args);
    events_.push_back(std::move(event));
  }
  std::string dump() && {
    return OrderedJson{{"displayTimeUnit", "ms"}, {"traceEvents", std::move(events_)}}.dump();
  }

 private:
  OrderedJson events_ = OrderedJson::array();
};

// draft_ns: at the beginning of its step it computed the draft model.
void add_rank(Events& events, int process, double begin_us, int64_t draft_ns, const StepTrace& step,
              const StepTrace::Rank& rank) {
  uint64_t wait = 0;
  uint64_t transfer = 0;
  for (const CollectiveTrace& c : rank.collectives) {
    wait += std::min(c.wait, c.length);
    transfer += c.length - std::min(c.wait, c.length);
  }
  const uint64_t compute = rank.length - std::min<uint64_t>(rank.length, wait + transfer);
  OrderedJson args{{"step", step.step},
                   {"tokens", step.tokens},
                   {"compute_us", us_of_ticks(compute)},
                   {"transfer_us", us_of_ticks(transfer)},
                   {"wait_us", us_of_ticks(wait)}};
  if (rank.dropped > 0) args["collectives_not_shown"] = rank.dropped;
  auto at = static_cast<uint64_t>(draft_ns / engine::kTraceTickNs);
  if (at > 0) args["draft_us"] = us_of_ticks(at);
  events.slice(process, "step", begin_us, us_of_ticks(rank.length), std::move(args));
  if (at > 0) events.slice(process, "draft", begin_us, us_of_ticks(at));
  const auto compute_until = [&](uint64_t end) {
    if (end > at) events.slice(process, "compute", begin_us + us_of_ticks(at), us_of_ticks(end - at));
  };
  for (const CollectiveTrace& c : rank.collectives) {
    compute_until(c.begin);
    const double begin = begin_us + us_of_ticks(c.begin);
    const uint32_t waited = std::min(c.wait, c.length);
    if (waited > 0) events.slice(process, "wait", begin, us_of_ticks(waited));
    events.slice(process, "transfer", begin + us_of_ticks(waited), us_of_ticks(c.length - waited),
                 {{"bytes", c.bytes}});
    at = uint64_t{c.begin} + c.length;
  }
  compute_until(rank.length);
}

// A number of the query string, or `fallback` without one. Throws Refused.
int64_t number_of(std::string_view query, std::string_view key, int64_t fallback, int64_t most) {
  while (!query.empty()) {
    const std::string_view pair = query.substr(0, query.find('&'));
    query.remove_prefix(std::min(query.size(), pair.size() + 1));
    if (pair.substr(0, pair.find('=')) != key) continue;
    const std::string_view text = pair.substr(std::min(pair.size(), key.size() + 1));
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error == std::errc() && end == text.data() + text.size() && value >= 1 && value <= most)
      return value;
    throw Refused(fmt::format("{} must be a whole number in [1, {}], got '{}'", key, most, text));
  }
  return fallback;
}

std::map<int, std::string> nodes_of(const Core& core) {
  std::map<int, std::string> nodes;
  if (!core.status_json) return nodes;
  const auto own = nlohmann::json::parse(core.status_json(), nullptr, false);
  if (!own.is_object()) return nodes;
  for (const auto& rank : own.value("ranks", nlohmann::json::array()))
    if (rank.is_object()) nodes[rank.value("rank", 0)] = rank.value("node", "");
  return nodes;
}

void profile(const std::shared_ptr<Core>& core, const HttpRequest& request,
             const std::shared_ptr<Responder>& responder) {
  const int64_t steps = number_of(request.query, "steps", kDefaultSteps, engine::kMaxTracedSteps);
  const int64_t seconds = number_of(request.query, "seconds", kDefaultSeconds, kMaxSeconds);
  if (core->stopped) throw Refused(unavailable("The service has been stopped."));
  const auto busy = [] {
    return Refused({.status = 409,
                    .error_type = "Bad Request",
                    .error = "A profile is being taken. Try again when it is done",
                    .retry_after_s = 1});
  };
  if (core->profiling.exchange(true)) throw busy();
  if (!core->engine.begin_trace(steps)) {
    core->profiling = false;
    throw Refused(unavailable("The engine cannot be profiled now", 1));
  }
  // The thread ends before the core does (shut_down).
  core->profiler = std::jthread([c = core.get(), responder, deadline = Deadline::in_seconds(
                                     static_cast<double>(seconds))](const std::stop_token& stop) {
    std::optional<std::vector<StepTrace>> trace;
    while (!(trace = c->engine.take_trace(false)) && !stop.stop_requested() &&
           Clock::now() < deadline.when())
      std::this_thread::sleep_for(kPoll);
    if (!trace) trace = c->engine.take_trace(true);
    HttpResponse response = to_response(unavailable("The service has been stopped."));
    if (trace) response = {.body = to_chrome_trace(*trace, nodes_of(*c)), .headers = {}};
    c->profiling = false;
    responder->respond(std::move(response));
  });
}

}  // namespace

std::string to_chrome_trace(std::span<const StepTrace> steps, const std::map<int, std::string>& nodes) {
  Events events;
  events.name(kHead, "head");
  const size_t ranks = steps.empty() ? 0 : steps.front().ranks.size();
  for (size_t r = 0; r < ranks; ++r) {
    const auto node = nodes.find(static_cast<int>(r));
    events.name(static_cast<int>(r) + 1, node == nodes.end() ? fmt::format("rank {}", r)
                                                             : fmt::format("rank {}, node {}", r, node->second));
  }
  for (const StepTrace& step : steps) {
    const auto at = [&](int64_t ns) { return us_of_ns(ns - steps.front().begin_ns); };
    events.slice(kHead, "plan", at(step.begin_ns), us_of_ns(step.sent_ns - step.begin_ns));
    events.slice(kHead, "ranks", at(step.sent_ns), us_of_ns(step.answered_ns - step.sent_ns),
                 {{"step", step.step},
                  {"generation", step.generation},
                  {"sequences", step.sequences},
                  {"tokens", step.tokens},
                  {"rows", step.rows}});
    events.slice(kHead, "sample", at(step.answered_ns), us_of_ns(step.end_ns - step.answered_ns));
    for (size_t r = 0; r < step.ranks.size(); ++r) {
      const int64_t draft_ns = std::clamp<int64_t>(step.draft_ns, 0, step.answered_ns - step.sent_ns);
      add_rank(events, static_cast<int>(r) + 1, at(step.sent_ns + (r == 0 ? 0 : draft_ns)),
               r == 0 ? draft_ns : 0, step, step.ranks[r]);
    }
  }
  return std::move(events).dump();
}

void mount_profile(const std::shared_ptr<Core>& core, Server& server) {
  server.route(kManagement, "GET", "/v1/profile",
               [core](const HttpRequest& request, const std::shared_ptr<Responder>& responder) {
                 try {
                   profile(core, request, responder);
                 } catch (...) {
                   respond_to_exception(*responder);
                 }
               });
}

}  // namespace phalanx::api
