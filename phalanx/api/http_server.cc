#include "phalanx/api/http_server.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/thread_pool.hpp>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>
#include <utility>

#include "phalanx/api/connection.h"
#include "phalanx/api/listener.h"
#include "phalanx/api/router.h"
#include "phalanx/base/log.h"
#include "phalanx/base/log_limit.h"

namespace phalanx::api {

namespace asio = boost::asio;

struct Server::State final : ConnectionHost, std::enable_shared_from_this<Server::State> {
  struct Entry {
    Entry(asio::io_context& io, const ListenerOptions& listener_options)
        : listener(io, listener_options) {}
    Listener listener;
    int64_t limit = 0;
    int64_t open = 0;  // under mutex_
  };

  explicit State(const ServerOptions& server_options)
      : options_(server_options),
        gate_(server_options.gate),
        work_(static_cast<size_t>(std::max(1, options_.work_threads))) {}

  const ServerOptions& options() const override { return options_; }

  const Handler* find_route(unsigned planes, std::string_view method, std::string_view path,
                            int* status, std::string* allow) const override {
    return router_.find(planes, method, path, status, allow);
  }

  std::optional<HttpResponse> refuse(const HttpRequest& head, std::string* user) override {
    return gate_.answer(head, user);
  }
  std::string header_lines(const HttpRequest& head) const override { return gate_.header_lines(head); }
  bool take_place() override {
    if (requests_.fetch_add(1) < options_.max_requests) return true;
    requests_.fetch_sub(1);
    return false;
  }
  void give_back_place() override { requests_.fetch_sub(1); }
  void finished(const AccessRecord& record) override {
    if (options_.on_finished) options_.on_finished(record);
  }
  void handshake_failed(const std::string& sentence) override {
    std::string note;
    if (refusals_.allow(&note)) log_warn("{}{}", sentence, note);
  }

  void closed(const Connection* connection) override {
    std::shared_ptr<Connection> last;  // released without the lock
    const std::lock_guard lock(mutex_);
    const auto it = connections_.find(connection);
    if (it == connections_.end()) return;
    last = std::move(it->second.first);
    --it->second.second->open;
    connections_.erase(it);
    changed_.notify_all();
  }

  void bind(const ListenerOptions& listener) {
    auto entry = std::make_unique<Entry>(io_, listener);
    entry->limit = (listener.planes & kBusiness)
                       ? options_.max_connections
                       : std::max<int64_t>(100, options_.max_connections / 10);
    listeners_.push_back(std::move(entry));
  }

  void welcome(Entry& entry, UniqueFd socket, std::string peer) {
    const ListenerOptions& listener = entry.listener.options();
    auto stream = listener.tls ? make_tls_stream(io_, std::move(socket), *listener.tls())
                               : make_tcp_stream(io_, std::move(socket));
    auto connection = std::make_shared<Connection>(shared_from_this(), std::move(stream),
                                                   listener.planes, std::move(peer));
    bool full = false;
    {
      const std::lock_guard lock(mutex_);
      if (stopping_) return;
      full = entry.open >= entry.limit;
      if (entry.open >= entry.limit + 64) return;  // not even a refusal
      ++entry.open;
      connections_.emplace(connection.get(), std::pair(connection, &entry));
    }
    if (full)
      connection->refuse({.status = 503,
                          .body = fmt::format("{{\"error\":\"Too many connections: {} are open, at "
                                              "most {}\",\"error_type\":\"Service Unavailable\"}}",
                                              entry.limit, entry.limit),
                          .headers = {{"Retry-After", "1"}}});
    else
      connection->start();
  }

  const ServerOptions options_;
  const Gate gate_;
  LogLimit refusals_;
  std::atomic<int64_t> requests_{0};
  asio::io_context io_;
  std::optional<asio::executor_work_guard<asio::io_context::executor_type>> guard_;
  Router router_;
  Decorator decorator_;
  std::vector<std::unique_ptr<Entry>> listeners_;
  std::vector<std::thread> threads_;
  asio::thread_pool work_;

  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::unordered_map<const Connection*, std::pair<std::shared_ptr<Connection>, Entry*>>
      connections_;
};

Server::Server(const ServerOptions& options) : state_(std::make_shared<State>(options)) {
  for (const auto& listener : options.listeners) state_->bind(listener);
}

Server::~Server() { stop(Deadline::in_seconds(0)); }

void Server::route(Plane plane, std::string method, std::string pattern, Handler handler) {
  if (state_->decorator_) handler = state_->decorator_(plane, method, pattern, std::move(handler));
  state_->router_.add(plane, std::move(method), std::move(pattern), std::move(handler));
}

void Server::decorate(Decorator decorator) { state_->decorator_ = std::move(decorator); }

void Server::start() {
  for (auto& entry : state_->listeners_) entry->listener.listen();
  state_->guard_.emplace(state_->io_.get_executor());
  for (auto& entry : state_->listeners_)
    entry->listener.accept([state = state_.get(), e = entry.get()](UniqueFd socket, std::string peer) {
      state->welcome(*e, std::move(socket), std::move(peer));
    });
  for (int i = 0; i < std::max(1, state_->options_.io_threads); ++i)
    state_->threads_.emplace_back([state = state_.get()] {
      for (;;) {
        try {
          state->io_.run();
          return;
        } catch (const std::exception& e) {
          log_error("HTTP io thread: {}", e.what());
        }
      }
    });
}

void Server::stop(Deadline deadline) {
  State& state = *state_;
  if (state.stopping_.exchange(true)) return;
  for (auto& entry : state.listeners_) entry->listener.close();
  const auto each = [&state](auto call) {
    std::vector<std::shared_ptr<Connection>> open;
    {
      const std::lock_guard lock(state.mutex_);
      for (const auto& [key, value] : state.connections_) open.push_back(value.first);
    }
    for (const auto& connection : open) call(*connection);
  };
  if (!state.threads_.empty()) {
    const auto all_closed = [&state] { return state.connections_.empty(); };
    each([](Connection& c) { c.close_when_idle(); });
    {
      std::unique_lock lock(state.mutex_);
      state.changed_.wait_until(lock, deadline.when(), all_closed);
    }
    each([](Connection& c) { c.close(); });
    {
      std::unique_lock lock(state.mutex_);
      state.changed_.wait_for(lock, std::chrono::seconds(2), all_closed);
    }
  }
  state.work_.stop();
  state.work_.join();
  state.guard_.reset();
  state.io_.stop();
  for (auto& thread : state.threads_) thread.join();
  state.threads_.clear();
  // What was posted late holds its connection, and that holds us: run it, all is closed.
  state.io_.restart();
  state.io_.poll();
  state.listeners_.clear();
  state.connections_.clear();
  state.io_.restart();
  state.io_.poll();
}

void Server::post_work(std::function<void()> work) {
  asio::post(state_->work_, [work = std::move(work)] {
    try {
      work();
    } catch (const std::exception& e) {
      log_error("HTTP work failed: {}", e.what());
    }
  });
}

std::vector<uint16_t> Server::ports() const {
  std::vector<uint16_t> ports;
  for (const auto& entry : state_->listeners_) ports.push_back(entry->listener.port());
  return ports;
}

}  // namespace phalanx::api
