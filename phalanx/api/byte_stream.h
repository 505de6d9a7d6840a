#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <system_error>

#include "phalanx/base/clock.h"
#include "phalanx/base/unique_fd.h"

namespace boost::asio {
class io_context;
}

namespace phalanx::net {
class TlsContext;
}

namespace phalanx::api {

// One client's bytes below HTTP (TCP or TLS), with the strand that all of its completions run on and
// one timer. At most one read and one write are outstanding; close() ends both with an error. The
// memory of a read or write stays lent until its completion. Completions may come after the
// stream's owner has let go, so they must own what they touch.
class ByteStream {
 public:
  using Done = std::function<void(std::error_code, size_t)>;
  virtual ~ByteStream() = default;
  // From any thread: runs `work` on the strand.
  virtual void post(std::function<void()> work) = 0;

  // On the strand:
  // Before the first byte. `failure` is empty, or says why there is no connection; then the peer may
  // still be told so, and what is read is of no meaning.
  virtual void handshake(std::function<void(const std::string& failure)> done) = 0;
  // After the handshake: the subject of the client's certificate, or empty.
  [[nodiscard]] virtual std::string peer_name() const = 0;
  virtual void read_some(std::span<char> buffer, Done done) = 0;
  // At least one byte of `bytes`, which is not empty.
  virtual void write_some(std::string_view bytes, Done done) = 0;
  // No more is sent; the peer may still send.
  virtual void shut_down_send() noexcept = 0;
  virtual void close() noexcept = 0;
  // Calls `wake` at `when` unless it is called again before, or cancel_wake().
  virtual void wake_at(Clock::time_point when, std::function<void()> wake) = 0;
  virtual void cancel_wake() noexcept = 0;
};

// `socket` is connected and non-blocking.
[[nodiscard]] std::unique_ptr<ByteStream> make_tcp_stream(boost::asio::io_context& io,
                                                          UniqueFd socket);
// The server's side of TLS. `context` may go afterwards.
[[nodiscard]] std::unique_ptr<ByteStream> make_tls_stream(boost::asio::io_context& io,
                                                          UniqueFd socket,
                                                          const net::TlsContext& context);

}  // namespace phalanx::api
