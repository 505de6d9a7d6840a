#pragma once

#include <boost/asio/basic_stream_socket.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/write.hpp>
#include <functional>
#include <utility>

// Only included by the .cc files of the room that speak to sockets.
namespace phalanx::api {

using Strand = boost::asio::strand<boost::asio::io_context::executor_type>;
using TcpSocket = boost::asio::basic_stream_socket<boost::asio::ip::tcp, Strand>;

// The bytes below HTTP: TCP, later TLS. Completions run on the connection's strand. At most one read
// and one write are outstanding; close() ends both with an error.
class ByteStream {
 public:
  using Done = std::function<void(boost::system::error_code, size_t)>;
  virtual ~ByteStream() = default;
  // Before the first byte.
  virtual void handshake(std::function<void(boost::system::error_code)> done) = 0;
  virtual void read_some(boost::asio::mutable_buffer buffer, Done done) = 0;
  virtual void write_all(boost::asio::const_buffer buffer, Done done) = 0;
  // No more is sent; the peer may still send.
  virtual void shut_down_send() noexcept = 0;
  virtual void close() noexcept = 0;
};

class TcpStream final : public ByteStream {
 public:
  explicit TcpStream(TcpSocket socket) : socket_(std::move(socket)) {}
  void handshake(std::function<void(boost::system::error_code)> done) override { done({}); }
  void read_some(boost::asio::mutable_buffer buffer, Done done) override {
    socket_.async_read_some(buffer, std::move(done));
  }
  void write_all(boost::asio::const_buffer buffer, Done done) override {
    boost::asio::async_write(socket_, buffer, std::move(done));
  }
  void shut_down_send() noexcept override {
    boost::system::error_code ignored;
    socket_.shutdown(boost::asio::ip::tcp::socket::shutdown_send, ignored);
  }
  void close() noexcept override {
    boost::system::error_code ignored;
    socket_.close(ignored);
  }

 private:
  TcpSocket socket_;
};

}  // namespace phalanx::api
