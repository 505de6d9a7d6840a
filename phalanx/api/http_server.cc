#include "phalanx/api/http_server.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <ifaddrs.h>
#include <netinet/in.h>

#include <algorithm>
#include <boost/asio/ip/address.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/thread_pool.hpp>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "phalanx/api/connection.h"
#include "phalanx/base/error.h"
#include "phalanx/base/log.h"

namespace phalanx::api {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;

std::string plane_names(unsigned planes) {
  std::vector<std::string_view> names;
  if (planes & kBusiness) names.push_back("business");
  if (planes & kManagement) names.push_back("management");
  if (planes & kMetrics) names.push_back("metrics");
  return fmt::format("{}", fmt::join(names, "+"));
}

std::string local_addresses() {
  std::vector<std::string> found;
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) return "unknown";
  for (const ifaddrs* i = list; i != nullptr; i = i->ifa_next) {
    if (i->ifa_addr == nullptr) continue;
    char text[INET6_ADDRSTRLEN] = {};
    const int family = i->ifa_addr->sa_family;
    if (family == AF_INET)
      ::inet_ntop(family, &reinterpret_cast<sockaddr_in*>(i->ifa_addr)->sin_addr, text, sizeof text);
    else if (family == AF_INET6)
      ::inet_ntop(family, &reinterpret_cast<sockaddr_in6*>(i->ifa_addr)->sin6_addr, text, sizeof text);
    if (text[0] != '\0') found.emplace_back(text);
  }
  ::freeifaddrs(list);
  return fmt::format("{}", fmt::join(found, ", "));
}

[[noreturn]] void throw_listen_error(const ListenerOptions& listener,
                                     boost::system::error_code error) {
  std::string text = fmt::format("Cannot listen on address {} port {} for the {} plane: {}.",
                                 listener.address, listener.port, plane_names(listener.planes),
                                 error.message());
  if (error == asio::error::address_in_use)
    text += fmt::format(" Fix: stop the program that uses port {} (`ss -ltnp`), or configure another "
                        "port.",
                        listener.port);
  else if (error.value() == EADDRNOTAVAIL)
    text += fmt::format(" Local addresses: {}. Fix: configure one of these.", local_addresses());
  throw Error(Code::kUnavailable, text);
}

struct Route {
  unsigned plane;
  std::string method;
  std::string pattern;
  bool prefix;
  Handler handler;
};

struct Listener {
  ListenerOptions options;
  tcp::acceptor acceptor;
  int64_t limit = 0;
  int64_t open = 0;  // under State's mutex
};

}  // namespace

std::string_view HttpRequest::header(std::string_view lower_name) const {
  for (const auto& [name, value] : headers)
    if (name == lower_name) return value;
  return {};
}

struct Server::State final : ConnectionHost, std::enable_shared_from_this<Server::State> {
  explicit State(const ServerOptions& server_options)
      : options_(server_options), work_(static_cast<size_t>(std::max(1, options_.work_threads))) {}

  const ServerOptions& options() const override { return options_; }

  const Handler* find_route(unsigned planes, std::string_view method, std::string_view path,
                            int* status, std::string* allow) const override {
    *status = 404;
    for (const Route& route : routes_) {
      if ((route.plane & planes) == 0) continue;
      if (route.prefix ? !path.starts_with(route.pattern) : path != route.pattern) continue;
      if (route.method == method) return &route.handler;
      *status = 405;
      if (allow->find(route.method) == std::string::npos)
        *allow += (allow->empty() ? "" : ", ") + route.method;
    }
    return nullptr;
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
    boost::system::error_code error;
    const auto address = asio::ip::make_address(listener.address, error);
    if (error) throw_listen_error(listener, error);
    const tcp::endpoint endpoint(address, listener.port);
    auto entry = std::make_unique<Listener>(Listener{listener, tcp::acceptor(io_)});
    entry->limit = (listener.planes & kBusiness)
                       ? options_.max_connections
                       : std::max<int64_t>(100, options_.max_connections / 10);
    auto& acceptor = entry->acceptor;
    acceptor.open(endpoint.protocol(), error);
    if (error) throw_listen_error(listener, error);
    // Without reuse first, since with it two sockets that do not listen yet may share a port; with it
    // if old connections still linger on the port.
    acceptor.bind(endpoint, error);
    if (error == asio::error::address_in_use) {
      acceptor.set_option(tcp::acceptor::reuse_address(true), error);
      acceptor.bind(endpoint, error);
    }
    if (error) throw_listen_error(listener, error);
    listeners_.push_back(std::move(entry));
  }

  void accept(Listener& listener) {
    listener.acceptor.async_accept(
        asio::make_strand(io_), [this, &listener](boost::system::error_code error, TcpSocket socket) {
          if (stopping_ || error == asio::error::operation_aborted) return;
          if (error) {
            log_warn("HTTP accept on port {} failed: {}; trying again", listener.options.port,
                     error.message());
            auto pause = std::make_shared<asio::steady_timer>(io_, std::chrono::milliseconds(100));
            pause->async_wait([this, &listener, pause](boost::system::error_code) {
              if (!stopping_) accept(listener);
            });
            return;
          }
          welcome(listener, std::move(socket));
          accept(listener);
        });
  }

  void welcome(Listener& listener, TcpSocket socket) {
    boost::system::error_code error;
    const auto remote = socket.remote_endpoint(error);
    if (error) return;
    socket.set_option(tcp::no_delay(true), error);
    const std::string peer = remote.address().is_v6()
                                 ? fmt::format("[{}]:{}", remote.address().to_string(), remote.port())
                                 : fmt::format("{}:{}", remote.address().to_string(), remote.port());
    const Strand strand = socket.get_executor();
    auto connection =
        std::make_shared<Connection>(shared_from_this(), strand,
                                     std::make_unique<TcpStream>(std::move(socket)),
                                     listener.options.planes, peer);
    bool full = false;
    {
      const std::lock_guard lock(mutex_);
      if (stopping_) return;
      full = listener.open >= listener.limit;
      if (listener.open >= listener.limit + 64) return;  // not even a refusal
      ++listener.open;
      connections_.emplace(connection.get(), std::pair(connection, &listener));
    }
    if (full)
      connection->refuse({.status = 503,
                          .body = fmt::format("{{\"error\":\"Too many connections: {} are open, at "
                                              "most {}\",\"error_type\":\"Service Unavailable\"}}",
                                              listener.limit, listener.limit),
                          .headers = {{"Retry-After", "1"}}});
    else
      connection->start();
  }

  ServerOptions options_;
  asio::io_context io_;
  std::optional<asio::executor_work_guard<asio::io_context::executor_type>> guard_;
  std::vector<Route> routes_;
  std::vector<std::unique_ptr<Listener>> listeners_;
  std::vector<std::thread> threads_;
  asio::thread_pool work_;

  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::unordered_map<const Connection*, std::pair<std::shared_ptr<Connection>, Listener*>>
      connections_;
};

Server::Server(const ServerOptions& options) : state_(std::make_shared<State>(options)) {
  for (const auto& listener : options.listeners) state_->bind(listener);
}

Server::~Server() { stop(Deadline::in_seconds(0)); }

void Server::route(Plane plane, std::string method, std::string pattern, Handler handler) {
  const bool prefix = pattern.ends_with('*');
  if (prefix) pattern.pop_back();
  state_->routes_.push_back({plane, std::move(method), std::move(pattern), prefix, std::move(handler)});
}

void Server::start() {
  for (auto& listener : state_->listeners_) {
    boost::system::error_code error;
    listener->acceptor.set_option(tcp::acceptor::reuse_address(true), error);
    listener->acceptor.listen(4096, error);
    if (error) throw_listen_error(listener->options, error);
  }
  state_->guard_.emplace(state_->io_.get_executor());
  for (auto& listener : state_->listeners_) state_->accept(*listener);
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
  for (auto& listener : state.listeners_)
    asio::post(state.io_, [l = listener.get()] {
      boost::system::error_code ignored;
      l->acceptor.close(ignored);
    });
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
  for (const auto& listener : state_->listeners_) {
    boost::system::error_code error;
    ports.push_back(listener->acceptor.local_endpoint(error).port());
  }
  return ports;
}

}  // namespace phalanx::api
