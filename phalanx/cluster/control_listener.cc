#include "phalanx/cluster/control_listener.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#include "phalanx/base/log.h"
#include "phalanx/base/log_limit.h"
#include "phalanx/comm/bootstrap.h"

namespace phalanx::cluster {
namespace {

constexpr int kAcceptsPerWake = 64;
constexpr auto kAfterFailure = std::chrono::milliseconds(100);  // no descriptors left, say

uint16_t port_of(const sockaddr_storage& address) {
  return ntohs(address.ss_family == AF_INET6
                   ? reinterpret_cast<const sockaddr_in6&>(address).sin6_port
                   : reinterpret_cast<const sockaddr_in&>(address).sin_port);
}

}  // namespace

struct ControlListener::State {
  // A second descriptor of a connection: it hangs up when gRPC, which shuts down before it closes,
  // or the peer is done with it.
  struct Watched {
    UniqueFd fd;
    uint16_t peer_port = 0;
    bool proved = false;
  };

  void accept_some() {
    for (int i = 0; i < kAcceptsPerWake; ++i) {
      sockaddr_storage from{};
      socklen_t length = sizeof from;
      UniqueFd connection(::accept4(listener.get(), reinterpret_cast<sockaddr*>(&from), &length,
                                    SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (!connection.valid()) {
        if (errno == EINTR || errno == ECONNABORTED) continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK) std::this_thread::sleep_for(kAfterFailure);
        return;
      }
      UniqueFd watch(::fcntl(connection.get(), F_DUPFD_CLOEXEC, 0));
      if (!watch.valid()) continue;
      {
        const std::lock_guard lock(mutex);
        make_room();
        connections.push_back({std::move(watch), port_of(from), false});
      }
      take(std::move(connection));
    }
  }

  void make_room() {  // with the mutex
    const auto unproved = [](const Watched& one) { return !one.proved; };
    if (static_cast<size_t>(std::count_if(connections.begin(), connections.end(), unproved)) <
        options.max_unproved)
      return;
    const auto oldest = std::find_if(connections.begin(), connections.end(), unproved);
    ::shutdown(oldest->fd.get(), SHUT_RDWR);
    connections.erase(oldest);
    std::string note;
    if (limit.allow(&note))
      log_warn(
          "control plane: more than {} connections that have not proved themselves; the oldest "
          "was closed{}",
          options.max_unproved, note);
  }

  void run(const std::stop_token& stop) {
    std::vector<pollfd> polled;
    while (!stop.stop_requested()) {
      polled.assign({{listener.get(), POLLIN, 0}, {wake.get(), POLLIN, 0}});
      {
        const std::lock_guard lock(mutex);
        for (const Watched& one : connections) polled.push_back({one.fd.get(), 0, 0});
      }
      if (::poll(polled.data(), polled.size(), -1) <= 0) continue;
      {
        // Only this thread adds and removes, so the places are the same.
        const std::lock_guard lock(mutex);
        for (size_t i = polled.size(); i-- > 2;)
          if (polled[i].revents != 0)
            connections.erase(connections.begin() + static_cast<std::ptrdiff_t>(i - 2));
      }
      if (polled[0].revents != 0) accept_some();
    }
  }

  Options options;
  UniqueFd listener;
  UniqueFd wake{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  Take take;
  LogLimit limit;
  std::mutex mutex;
  std::vector<Watched> connections;  // guarded by mutex; in order of arrival
  std::jthread thread;               // last: uses the others
};

ControlListener::ControlListener(const Options& options) : state_(std::make_unique<State>()) {
  state_->options = options;
  uint16_t port = options.port;
  state_->listener = comm::listen_on(options.address, port, port, &port);
}

ControlListener::~ControlListener() {
  state_->thread.request_stop();
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = ::write(state_->wake.get(), &one, sizeof one);
}

void ControlListener::start(Take take) {
  state_->take = std::move(take);
  state_->thread = std::jthread([this](const std::stop_token& stop) { state_->run(stop); });
}

void ControlListener::proved(uint16_t peer_port) {
  const std::lock_guard lock(state_->mutex);
  for (State::Watched& one : state_->connections)
    if (one.peer_port == peer_port) one.proved = true;
}

}  // namespace phalanx::cluster
