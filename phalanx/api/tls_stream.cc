#include <netinet/in.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <boost/asio/basic_stream_socket.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <string>
#include <system_error>
#include <utility>

#include "phalanx/api/byte_stream.h"
#include "phalanx/base/check.h"
#include "phalanx/net/certificate.h"
#include "phalanx/net/tls_context.h"

namespace phalanx::api {
namespace {

namespace asio = boost::asio;
using Protocol = asio::generic::stream_protocol;
using Strand = asio::strand<asio::io_context::executor_type>;

constexpr size_t kMostPerWrite = 65536;

std::string broken_off(std::error_code failure) {
  if (failure == std::error_code(asio::error::make_error_code(asio::error::eof)))
    return "the client closed the connection before it was complete";
  if (failure == std::error_code(asio::error::make_error_code(asio::error::operation_aborted)))
    return "it was not complete in time";
  return failure.message();
}

// OpenSSL between two memory buffers; this object carries their bytes. Held by its own completions.
class TlsPipe final : public std::enable_shared_from_this<TlsPipe> {
 public:
  using Done = ByteStream::Done;
  TlsPipe(asio::io_context& io, UniqueFd socket, SSL_CTX* context)
      : strand_(asio::make_strand(io)),
        socket_(strand_, Protocol(AF_INET, IPPROTO_TCP), socket.release()),
        timer_(strand_),
        ssl_(SSL_new(context)) {
    PHALANX_CHECK(ssl_ != nullptr);
    received_ = BIO_new(BIO_s_mem());
    to_send_ = BIO_new(BIO_s_mem());
    PHALANX_CHECK(received_ != nullptr && to_send_ != nullptr);
    BIO_set_mem_eof_return(received_, -1);
    SSL_set_bio(ssl_, received_, to_send_);  // owns both
    SSL_set_accept_state(ssl_);
  }
  ~TlsPipe() { SSL_free(ssl_); }
  TlsPipe(const TlsPipe&) = delete;
  TlsPipe& operator=(const TlsPipe&) = delete;

  void post(std::function<void()> work) { asio::post(strand_, std::move(work)); }

  void handshake(std::function<void(const std::string&)> done) {
    ERR_clear_error();
    const int result = SSL_do_handshake(ssl_);
    if (result == 1) {
      after_flush_ = [done = std::move(done)] { done({}); };
      return flush();
    }
    const int error = SSL_get_error(ssl_, result);
    if (error == SSL_ERROR_WANT_READ) {
      flush();
      return receive([self = shared_from_this(), done = std::move(done)](std::error_code failure) {
        if (failure) return done(broken_off(failure));
        self->handshake(done);
      });
    }
    failed_ = true;
    done(failure_text());
    flush();  // the alert
    if (socket_.is_open()) ::shutdown(socket_.native_handle(), SHUT_WR);
  }

  [[nodiscard]] std::string peer_name() const {
    const auto certificate = net::peer_certificate(ssl_);
    return certificate ? certificate->info().subject : std::string();
  }

  void read_some(std::span<char> buffer, Done done) {
    if (failed_) return socket_.async_read_some(asio::buffer(cipher_), std::move(done));
    ERR_clear_error();
    const int bytes = SSL_read(ssl_, buffer.data(), static_cast<int>(buffer.size()));
    if (bytes > 0)
      return post([done = std::move(done), bytes] { done({}, static_cast<size_t>(bytes)); });
    switch (SSL_get_error(ssl_, bytes)) {
      case SSL_ERROR_WANT_READ:
        flush();  // the answer to a key update, perhaps
        return receive(
            [self = shared_from_this(), buffer, done = std::move(done)](std::error_code failure) {
              if (failure) return done(failure, 0);
              self->read_some(buffer, done);
            });
      case SSL_ERROR_ZERO_RETURN:
        return post([done = std::move(done)] { done(asio::error::make_error_code(asio::error::eof), 0); });
      default:
        ERR_clear_error();
        return post([done = std::move(done)] {
          done(asio::error::make_error_code(asio::error::connection_aborted), 0);
        });
    }
  }

  void write_some(std::string_view bytes, Done done) {
    ERR_clear_error();
    const int taken =
        SSL_write(ssl_, bytes.data(), static_cast<int>(std::min(bytes.size(), kMostPerWrite)));
    if (taken <= 0) {
      ERR_clear_error();
      return post([done = std::move(done)] {
        done(asio::error::make_error_code(asio::error::connection_aborted), 0);
      });
    }
    written_ = std::move(done);
    taken_ = static_cast<size_t>(taken);
    flush();
  }

  void shut_down_send() {
    SSL_shutdown(ssl_);
    ERR_clear_error();
    after_flush_ = [self = shared_from_this()] {
      if (self->socket_.is_open()) ::shutdown(self->socket_.native_handle(), SHUT_WR);
    };
    flush();
  }
  void close() {
    boost::system::error_code ignored;
    socket_.close(ignored);
  }
  void wake_at(Clock::time_point when, std::function<void()> wake) {
    timer_.expires_at(when);
    timer_.async_wait([wake = std::move(wake)](boost::system::error_code error) {
      if (!error) wake();
    });
  }
  void cancel_wake() { timer_.cancel(); }

 private:
  // Why the handshake failed, for the log.
  std::string failure_text() {
    std::string sentence = net::refusal(ssl_);
    const unsigned long code = ERR_peek_error();
    const char* reason = ERR_reason_error_string(code);
    if (sentence.empty() && reason != nullptr) {
      sentence = reason;
      const int number = ERR_GET_REASON(code);
      if (number == SSL_R_HTTP_REQUEST || number == SSL_R_WRONG_VERSION_NUMBER)
        sentence += ": the client speaks plain HTTP or no TLS; this port is https://";
      else if (number == SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE)
        sentence += ": this plane asks for a client certificate (curl --cert FILE --key FILE)";
      else if (number == SSL_R_UNSUPPORTED_PROTOCOL)
        sentence += ": TLS 1.3 is needed";
      else if (ERR_SYSTEM_ERROR(code) == 0 && std::string_view(reason).find("alert") !=
                                                  std::string_view::npos)
        sentence += ": the client refuses this server's certificate or does not take part";
    }
    ERR_clear_error();
    return sentence.empty() ? "unknown error" : sentence;
  }

  // More bytes from the client into OpenSSL.
  void receive(std::function<void(std::error_code)> next) {
    socket_.async_read_some(asio::buffer(cipher_),
                            [self = shared_from_this(), next = std::move(next)](
                                boost::system::error_code error, size_t bytes) {
                              if (!error)
                                BIO_write(self->received_, self->cipher_.data(),
                                          static_cast<int>(bytes));
                              next(error);
                            });
  }

  // Sends what OpenSSL has made; then calls after_flush_ and completes the write. A failure is told
  // to the write, else to the outstanding read.
  void flush() {
    if (sending_) return;
    char* data = nullptr;
    const long size = BIO_get_mem_data(to_send_, &data);
    if (size > 0) {
      flying_.assign(data, static_cast<size_t>(size));
      (void)BIO_reset(to_send_);
      flown_ = 0;
      sending_ = true;
      return send();
    }
    if (auto next = std::exchange(after_flush_, nullptr)) next();
    if (auto done = std::exchange(written_, nullptr))
      post([done = std::move(done), taken = taken_] { done({}, taken); });
  }

  void send() {
    socket_.async_write_some(
        asio::buffer(flying_.data() + flown_, flying_.size() - flown_),
        [self = shared_from_this()](boost::system::error_code error, size_t bytes) {
          self->flown_ += bytes;
          if (!error && self->flown_ < self->flying_.size()) return self->send();
          self->sending_ = false;
          self->flying_.clear();
          if (!error) return self->flush();
          self->after_flush_ = nullptr;
          if (auto done = std::exchange(self->written_, nullptr)) done(error, 0);
        });
  }

  Strand strand_;
  asio::basic_stream_socket<Protocol, Strand> socket_;
  asio::steady_timer timer_;
  SSL* ssl_;
  BIO* received_;
  BIO* to_send_;
  std::array<char, 16384> cipher_;
  std::string flying_;
  size_t flown_ = 0;
  bool sending_ = false;
  bool failed_ = false;  // the handshake; what is read then means nothing
  std::function<void()> after_flush_;
  Done written_;
  size_t taken_ = 0;
};

class TlsStream final : public ByteStream {
 public:
  explicit TlsStream(std::shared_ptr<TlsPipe> pipe) : pipe_(std::move(pipe)) {}
  void post(std::function<void()> work) override { pipe_->post(std::move(work)); }
  void handshake(std::function<void(const std::string&)> done) override {
    pipe_->handshake(std::move(done));
  }
  std::string peer_name() const override { return pipe_->peer_name(); }
  void read_some(std::span<char> buffer, Done done) override {
    pipe_->read_some(buffer, std::move(done));
  }
  void write_some(std::string_view bytes, Done done) override {
    pipe_->write_some(bytes, std::move(done));
  }
  void shut_down_send() noexcept override { pipe_->shut_down_send(); }
  void close() noexcept override { pipe_->close(); }
  void wake_at(Clock::time_point when, std::function<void()> wake) override {
    pipe_->wake_at(when, std::move(wake));
  }
  void cancel_wake() noexcept override { pipe_->cancel_wake(); }

 private:
  std::shared_ptr<TlsPipe> pipe_;
};

}  // namespace

std::unique_ptr<ByteStream> make_tls_stream(asio::io_context& io, UniqueFd socket,
                                            const net::TlsContext& context) {
  return std::make_unique<TlsStream>(
      std::make_shared<TlsPipe>(io, std::move(socket), context.native()));
}

}  // namespace phalanx::api
