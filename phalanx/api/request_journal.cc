#include "phalanx/api/request_journal.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>
#include <utility>

#include "phalanx/api/core.h"
#include "phalanx/api/refusal.h"
#include "phalanx/api/router.h"
#include "phalanx/base/clock.h"
#include "phalanx/base/log.h"

namespace phalanx::api {
namespace {

using nlohmann::json;

constexpr std::string_view kFetch = "/v1/requests/";
constexpr std::array kRoutes = {"/v1/chat/completions", "/v1/completions", "/v1/responses",
                                "/v1/messages", "/generate", "/", "/infer", "/infer_token",
                                "/v2/models/*"};
// What a route may look at; keys of clients are not among them.
constexpr std::array kHeaders = {"content-type", "accept", "req-id", "traceparent", "tracestate",
                                 "anthropic-version"};
constexpr size_t kAtOnce = 32;  // of an earlier process's requests
constexpr auto kKept = std::chrono::hours(1);
constexpr auto kAgain = std::chrono::seconds(1);

// A request that asks for a stream, or that no dialect can read, is not kept.
bool is_kept(const HttpRequest& request) {
  if (request.path.find("stream") != std::string::npos || request.path.ends_with("/stopInfer"))
    return false;
  // What lies deeper than the first level is not looked at.
  const json::parser_callback_t top = [](int depth, json::parse_event_t, json&) { return depth <= 1; };
  const json body = json::parse(request.body, top, false);
  if (body.is_discarded()) return false;
  if (!body.is_object()) return true;
  const auto stream = body.find("stream");
  return stream == body.end() || !stream->is_boolean() || !stream->get<bool>();
}

std::string to_text(const HttpRequest& request) {
  json headers = json::object();
  for (const char* name : kHeaders)
    if (const std::string_view value = request.header(name); !value.empty()) headers[name] = value;
  return json{{"id", request.id},     {"path", request.path}, {"query", request.query},
              {"headers", headers},   {"user", request.user}, {"peer", request.peer},
              {"body", request.body}}
      .dump(-1, ' ', false, json::error_handler_t::replace);
}

// Throws what nlohmann::json throws.
HttpRequest from_text(const std::string& text) {
  const json j = json::parse(text);
  HttpRequest request{.method = "POST",
                      .path = j.at("path"),
                      .query = j.at("query"),
                      .headers = {},
                      .body = j.at("body"),
                      .peer = j.at("peer"),
                      .id = j.at("id"),
                      .user = j.at("user")};
  for (const auto& [name, value] : j.at("headers").items())
    request.headers.emplace_back(name, value.get<std::string>());
  return request;
}

void call(const Handler& handler, HttpRequest request, const std::shared_ptr<Responder>& responder) {
  try {
    handler(std::move(request), responder);
  } catch (...) {
    respond_to_exception(*responder);
  }
}

}  // namespace

struct RequestJournal::State : std::enable_shared_from_this<State> {
  // On its way to the disk, if it is to be kept, and to its route.
  struct Arrival {
    HttpRequest request;
    std::shared_ptr<Responder> responder;
    Handler handler;
    uint64_t number = 0;  // 0: not kept
  };
  // Of an earlier process.
  struct Kept {
    HttpRequest request;
    bool running = false;
    std::optional<HttpResponse> answer;
    Clock::time_point when{};  // to begin again, or to be forgotten
  };

  explicit State(JournalFile opened) : file(std::move(opened)) {
    for (const auto& [number, text] : file.entries()) {
      next = std::max(next, number + 1);
      try {
        kept.emplace(number, Kept{.request = from_text(text)});
      } catch (const std::exception&) {
        finished.push_back(number);
      }
    }
    if (!finished.empty())
      log_warn("request journal {}: {} damaged requests were dropped", file.path(), finished.size());
    if (!kept.empty())
      log_info("request journal {}: {} requests of an earlier process will be answered; their "
               "answers are at GET {}ID",
               file.path(), kept.size(), kFetch);
  }

  Handler through_file(Handler handler);
  HttpResponse fetch(const HttpRequest& request);
  void finish(uint64_t number) {
    const std::lock_guard lock(mutex);
    live.erase(number);
    finished.push_back(number);
    wake();
  }
  void answered(uint64_t number, HttpResponse response);

  // Under the mutex.
  void wake() {
    woken = true;
    changed.notify_all();
  }
  void run(const std::stop_token& stop);
  void admit(std::vector<Arrival> batch);
  void begin(uint64_t number);
  // Numbers of kept requests to begin now; forgets old answers. Under the mutex.
  std::vector<uint64_t> due();

  std::mutex mutex;
  std::condition_variable_any changed;
  bool woken = false;
  std::vector<Arrival> arrivals;
  std::vector<uint64_t> finished;
  std::map<uint64_t, std::pair<std::string, std::string>> live;  // id and user, of this process
  std::map<uint64_t, Kept> kept;
  bool answering = false;
  Router routes;  // undecorated

  // Of the constructor, then of the thread:
  JournalFile file;
  uint64_t next = 1;
  std::jthread thread;
};

// The client's responder; the entry goes when the client has its answer, or has left.
class RequestJournal::WatchedAnswer final : public Responder {
 public:
  WatchedAnswer(std::shared_ptr<State> state, uint64_t number, std::shared_ptr<Responder> client)
      : state_(std::move(state)), number_(number), client_(std::move(client)) {}
  ~WatchedAnswer() override { state_->finish(number_); }
  void respond(HttpResponse response) override { client_->respond(std::move(response)); }
  void start_stream(int status, std::string content_type,
                    std::vector<std::pair<std::string, std::string>> headers) override {
    client_->start_stream(status, std::move(content_type), std::move(headers));
  }
  void write(std::string bytes) override { client_->write(std::move(bytes)); }
  void end() override { client_->end(); }
  void on_disconnect(std::function<void()> callback) override {
    client_->on_disconnect(std::move(callback));
  }

 private:
  const std::shared_ptr<State> state_;
  const uint64_t number_;
  const std::shared_ptr<Responder> client_;
};

// Takes the answer to a request whose client is gone.
class RequestJournal::KeptAnswer final : public Responder {
 public:
  KeptAnswer(std::shared_ptr<State> state, uint64_t number)
      : state_(std::move(state)), number_(number) {}
  ~KeptAnswer() override {
    if (!done_)
      state_->answered(number_, {.status = 500, .content_type = "text/plain",
                                 .body = "Server internal error", .headers = {}});
  }
  void respond(HttpResponse response) override { give(std::move(response)); }
  void start_stream(int status, std::string content_type,
                    std::vector<std::pair<std::string, std::string>> headers) override {
    stream_ = {.status = status, .content_type = std::move(content_type), .body = {},
               .headers = std::move(headers)};
  }
  void write(std::string bytes) override { stream_.body += bytes; }
  void end() override { give(std::move(stream_)); }
  void on_disconnect(std::function<void()>) override {}

 private:
  void give(HttpResponse response) {
    if (done_.exchange(true)) return;
    state_->answered(number_, std::move(response));
  }
  const std::shared_ptr<State> state_;
  const uint64_t number_;
  HttpResponse stream_;
  std::atomic<bool> done_{false};
};

Handler RequestJournal::State::through_file(Handler handler) {
  return [weak = weak_from_this(), handler = std::move(handler)](
             HttpRequest request, std::shared_ptr<Responder> responder) {
    const auto state = weak.lock();
    if (!state) return;
    const std::lock_guard lock(state->mutex);
    state->arrivals.push_back({std::move(request), std::move(responder), handler});
    state->wake();
  };
}

HttpResponse RequestJournal::State::fetch(const HttpRequest& request) {
  const std::string id = request.path.substr(kFetch.size());
  const HttpResponse running{.status = 202,
                             .body = json{{"id", id}, {"status", "running"}}.dump(),
                             .headers = {{"Retry-After", "1"}}};
  const std::lock_guard lock(mutex);
  for (auto it = kept.rbegin(); it != kept.rend(); ++it) {
    auto& [number, old] = *it;
    if (old.request.id != id || old.request.user != request.user) continue;
    if (!old.answer) return running;
    HttpResponse response = std::move(*old.answer);
    finished.push_back(number);
    kept.erase(std::next(it).base());
    wake();
    return response;
  }
  for (const auto& [number, who] : live)
    if (who.first == id && who.second == request.user) return running;
  return to_response(not_found(fmt::format(
      "No request '{}' of this client is kept: it was answered, was a stream, or did not come with "
      "this X-Request-Id",
      id)));
}

void RequestJournal::State::answered(uint64_t number, HttpResponse response) {
  const std::lock_guard lock(mutex);
  const auto it = kept.find(number);
  if (it == kept.end()) return;
  Kept& old = it->second;
  old.running = false;
  if (response.status == 503 || response.status == 429) {  // as many came from clients meanwhile
    old.when = Clock::now() + kAgain;
  } else {
    log_info("request {} of the journal is answered with {}", old.request.id, response.status);
    old.answer = std::move(response);
    old.when = Clock::now() + kKept;
  }
  wake();
}

std::vector<uint64_t> RequestJournal::State::due() {
  std::vector<uint64_t> numbers;
  auto running = static_cast<size_t>(
      std::count_if(kept.begin(), kept.end(), [](const auto& k) { return k.second.running; }));
  const auto now = Clock::now();
  for (auto it = kept.begin(); it != kept.end();) {
    auto& [number, old] = *it;
    if (old.answer && now >= old.when) {
      finished.push_back(number);
      it = kept.erase(it);
      continue;
    }
    if (answering && !old.answer && !old.running && now >= old.when && running < kAtOnce) {
      old.running = true;
      ++running;
      numbers.push_back(number);
    }
    ++it;
  }
  return numbers;
}

void RequestJournal::State::run(const std::stop_token& stop) {
  std::unique_lock lock(mutex);
  while (!stop.stop_requested()) {
    const std::vector<uint64_t> begins = due();
    std::vector<Arrival> batch = std::exchange(arrivals, {});
    const std::vector<uint64_t> gone = std::exchange(finished, {});
    if (begins.empty() && batch.empty() && gone.empty()) {
      changed.wait_for(lock, stop, kAgain, [this] { return std::exchange(woken, false); });
      continue;
    }
    lock.unlock();
    file.remove(gone);
    admit(std::move(batch));
    for (const uint64_t number : begins) begin(number);
    lock.lock();
  }
}

void RequestJournal::State::admit(std::vector<Arrival> batch) {
  std::vector<JournalFile::Entry> entries;
  for (Arrival& arrival : batch) {
    if (!is_kept(arrival.request)) continue;
    const uint64_t number = next++;
    entries.push_back({number, to_text(arrival.request)});
    arrival.responder = std::make_shared<WatchedAnswer>(shared_from_this(), number,
                                                        std::move(arrival.responder));
    arrival.number = number;
    const std::lock_guard lock(mutex);
    live.emplace(number, std::pair(arrival.request.id, arrival.request.user));
  }
  std::optional<HttpResponse> refusal;
  try {
    file.add(entries);
  } catch (const Error& error) {
    log_warn("request journal {} cannot be written: {}; requests are refused", file.path(),
             error.what());
    refusal = to_response(unavailable(
        fmt::format("The request journal cannot be written: {}", error.what()), 5));
  }
  for (Arrival& arrival : batch) {
    if (refusal && arrival.number > 0)
      arrival.responder->respond(*refusal);
    else
      call(arrival.handler, std::move(arrival.request), arrival.responder);
  }
}

void RequestJournal::State::begin(uint64_t number) {
  HttpRequest request;
  {
    const std::lock_guard lock(mutex);
    request = kept.at(number).request;
  }
  const auto answer = std::make_shared<KeptAnswer>(shared_from_this(), number);
  int status = 404;
  std::string allow;
  const Handler* handler = routes.find(kBusiness, "POST", request.path, &status, &allow);
  if (handler != nullptr)
    call(*handler, std::move(request), answer);
  else
    answer->respond(to_response(not_found("This version has no route " + request.path)));
}

RequestJournal::RequestJournal(JournalFile file)
    : state_(std::make_shared<State>(std::move(file))) {
  state_->thread = std::jthread([s = state_.get()](const std::stop_token& stop) { s->run(stop); });
}

RequestJournal::~RequestJournal() {
  state_->thread.request_stop();
  state_->thread.join();
  // What was answered last.
  const std::lock_guard lock(state_->mutex);
  state_->file.remove(state_->finished);
  state_->finished.clear();
  state_->arrivals.clear();
}

void RequestJournal::mount(Server& server) {
  server.route(kBusiness, "GET", std::string(kFetch) + "*",
               [state = state_](const HttpRequest& request,
                                const std::shared_ptr<Responder>& responder) {
                 responder->respond(state->fetch(request));
               });
  server.decorate([state = state_](Plane plane, const std::string& method,
                                   const std::string& pattern, Handler handler) -> Handler {
    const bool ours = plane == kBusiness && method == "POST" &&
                      std::find(kRoutes.begin(), kRoutes.end(), pattern) != kRoutes.end();
    if (!ours) return handler;
    state->routes.add(plane, method, pattern, handler);
    return state->through_file(std::move(handler));
  });
}

void RequestJournal::answer_what_was_left() {
  const std::lock_guard lock(state_->mutex);
  state_->answering = true;
  state_->wake();
}

}  // namespace phalanx::api
