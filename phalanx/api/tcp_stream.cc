#include <netinet/in.h>
#include <sys/socket.h>

#include <boost/asio/basic_stream_socket.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <utility>

#include "phalanx/api/byte_stream.h"

namespace phalanx::api {
namespace {

namespace asio = boost::asio;
using Protocol = asio::generic::stream_protocol;
using Strand = asio::strand<asio::io_context::executor_type>;

class TcpStream final : public ByteStream {
 public:
  TcpStream(asio::io_context& io, UniqueFd socket)
      : strand_(asio::make_strand(io)),
        socket_(strand_, Protocol(AF_INET, IPPROTO_TCP), socket.release()),
        timer_(strand_) {}
  void post(std::function<void()> work) override { asio::post(strand_, std::move(work)); }
  void handshake(std::function<void(const std::string&)> done) override { done({}); }
  std::string peer_name() const override { return {}; }
  void read_some(std::span<char> buffer, Done done) override {
    socket_.async_read_some(asio::buffer(buffer.data(), buffer.size()), std::move(done));
  }
  void write_some(std::string_view bytes, Done done) override {
    socket_.async_write_some(asio::buffer(bytes.data(), bytes.size()), std::move(done));
  }
  void shut_down_send() noexcept override {
    if (socket_.is_open()) ::shutdown(socket_.native_handle(), SHUT_WR);
  }
  void close() noexcept override {
    boost::system::error_code ignored;
    socket_.close(ignored);
  }
  void wake_at(Clock::time_point when, std::function<void()> wake) override {
    timer_.expires_at(when);
    timer_.async_wait([wake = std::move(wake)](boost::system::error_code error) {
      if (!error) wake();
    });
  }
  void cancel_wake() noexcept override { timer_.cancel(); }

 private:
  Strand strand_;
  asio::basic_stream_socket<Protocol, Strand> socket_;
  asio::steady_timer timer_;
};

}  // namespace

std::unique_ptr<ByteStream> make_tcp_stream(asio::io_context& io, UniqueFd socket) {
  return std::make_unique<TcpStream>(io, std::move(socket));
}

}  // namespace phalanx::api
