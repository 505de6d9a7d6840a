#include "phalanx/api/listener.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/address.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <cerrno>
#include <cstring>
#include <chrono>
#include <string_view>
#include <utility>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/base/log.h"
#include "phalanx/net/address.h"

namespace phalanx::api {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using Strand = asio::strand<asio::io_context::executor_type>;

constexpr int kBacklog = 4096;
constexpr int kClientsPerWake = 64;
constexpr auto kAfterFailure = std::chrono::milliseconds(100);

[[noreturn]] void throw_listen_error(const ListenerOptions& listener, std::error_code error) {
  std::string text = fmt::format("Cannot listen on address {} port {} for the {} plane: {}.",
                                 listener.address, listener.port, plane_names(listener.planes),
                                 error.message());
  if (error.value() == EADDRINUSE)
    text += fmt::format(" Fix: stop the program that uses port {} (`ss -ltnp`), or configure another "
                        "port.",
                        listener.port);
  else if (error.value() == EADDRNOTAVAIL)
    text += fmt::format(" Local addresses: {}. Fix: configure one of these.",
                        net::own_addresses_text());
  throw Error(Code::kUnavailable, text);
}

}  // namespace

std::string plane_names(unsigned planes) {
  std::vector<std::string_view> names;
  if (planes & kBusiness) names.push_back("business");
  if (planes & kManagement) names.push_back("management");
  if (planes & kMetrics) names.push_back("metrics");
  return fmt::format("{}", fmt::join(names, "+"));
}

// Held by its own completions, so that the Listener may go while one of them runs.
struct Listener::State final : std::enable_shared_from_this<State> {
  State(asio::io_context& io, ListenerOptions listener_options)
      : options(std::move(listener_options)),
        strand(asio::make_strand(io)),
        acceptor(strand),
        pause(strand) {}

  void bind() {
    boost::system::error_code error;
    const auto address = asio::ip::make_address(options.address, error);
    if (error) throw_listen_error(options, error);
    const tcp::endpoint endpoint(address, options.port);
    const int fd =
        ::socket(endpoint.protocol().family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) throw_listen_error(options, {errno, std::generic_category()});
    acceptor.assign(endpoint.protocol(), fd);
    // Without reuse first, since with it two sockets that do not listen yet may share a port; with it
    // if old connections still linger on the port.
    acceptor.bind(endpoint, error);
    if (error == asio::error::address_in_use) {
      acceptor.set_option(tcp::acceptor::reuse_address(true), error);
      acceptor.bind(endpoint, error);
    }
    if (error) throw_listen_error(options, error);
  }

  void wait() {
    acceptor.async_wait(tcp::acceptor::wait_read,
                        [self = shared_from_this()](boost::system::error_code error) {
                          if (!error) self->take_clients();
                        });
  }

  void take_clients() {
    for (int i = 0; i < kClientsPerWake && acceptor.is_open(); ++i) {
      sockaddr_storage from{};
      socklen_t length = sizeof from;
      UniqueFd socket(::accept4(acceptor.native_handle(), reinterpret_cast<sockaddr*>(&from), &length,
                                SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (!socket.valid()) {
        if (errno == EAGAIN || errno == EWOULDBLOCK) break;
        if (errno == EINTR || errno == ECONNABORTED) continue;
        log_warn("HTTP accept on port {} failed: {}; trying again", options.port,
                 std::generic_category().message(errno));
        pause.expires_after(kAfterFailure);
        pause.async_wait([self = shared_from_this()](boost::system::error_code error) {
          if (!error) self->wait();
        });
        return;
      }
      const int one = 1;
      ::setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
      tcp::endpoint remote;
      std::memcpy(remote.data(), &from, std::min<size_t>(length, remote.capacity()));
      on_client(std::move(socket), net::endpoint(remote.address().to_string(), remote.port()));
    }
    if (acceptor.is_open()) wait();
  }

  const ListenerOptions options;
  Strand strand;
  tcp::acceptor acceptor;
  asio::steady_timer pause;
  OnClient on_client;
};

Listener::Listener(asio::io_context& io, const ListenerOptions& options)
    : state_(std::make_shared<State>(io, options)) {
  state_->bind();
}

Listener::~Listener() = default;

void Listener::listen() {
  boost::system::error_code error;
  state_->acceptor.set_option(tcp::acceptor::reuse_address(true), error);
  state_->acceptor.listen(kBacklog, error);
  if (error) throw_listen_error(state_->options, error);
}

void Listener::accept(OnClient on_client) {
  state_->on_client = std::move(on_client);
  asio::post(state_->strand, [state = state_] { state->wait(); });
}

void Listener::close() {
  asio::post(state_->strand, [state = state_] {
    boost::system::error_code ignored;
    state->acceptor.close(ignored);
    state->pause.cancel();
  });
}

uint16_t Listener::port() const {
  boost::system::error_code error;
  return state_->acceptor.local_endpoint(error).port();
}

const ListenerOptions& Listener::options() const { return state_->options; }

}  // namespace phalanx::api
