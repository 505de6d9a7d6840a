#include "phalanx/api/http_server.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <ifaddrs.h>
#include <netinet/in.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <boost/asio/basic_stream_socket.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/address.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/status.hpp>
#include <boost/beast/http/string_body.hpp>
#include <cctype>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>

#include "phalanx/base/error.h"
#include "phalanx/base/log.h"

namespace phalanx::api {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using asio::ip::tcp;

using Strand = asio::strand<asio::io_context::executor_type>;
using TcpSocket = asio::basic_stream_socket<tcp, Strand>;

// The bytes below HTTP: TCP, later TLS. Completions run on the connection's strand. At most one read
// and one write are outstanding; close() ends both with an error.
class ByteStream {
 public:
  using Done = std::function<void(boost::system::error_code, size_t)>;
  virtual ~ByteStream() = default;
  // Before the first byte.
  virtual void handshake(std::function<void(boost::system::error_code)> done) = 0;
  virtual void read_some(asio::mutable_buffer buffer, Done done) = 0;
  virtual void write_all(asio::const_buffer buffer, Done done) = 0;
  // No more is sent; the peer may still send.
  virtual void shut_down_send() noexcept = 0;
  virtual void close() noexcept = 0;
};

class TcpStream final : public ByteStream {
 public:
  explicit TcpStream(TcpSocket socket) : socket_(std::move(socket)) {}
  void handshake(std::function<void(boost::system::error_code)> done) override { done({}); }
  void read_some(asio::mutable_buffer buffer, Done done) override {
    socket_.async_read_some(buffer, std::move(done));
  }
  void write_all(asio::const_buffer buffer, Done done) override {
    asio::async_write(socket_, buffer, std::move(done));
  }
  void shut_down_send() noexcept override {
    boost::system::error_code ignored;
    socket_.shutdown(tcp::socket::shutdown_send, ignored);
  }
  void close() noexcept override {
    boost::system::error_code ignored;
    socket_.close(ignored);
  }

 private:
  TcpSocket socket_;
};

// What a connection needs of its server. Called on the connection's strand.
class ConnectionHost {
 public:
  virtual ~ConnectionHost() = default;
  [[nodiscard]] virtual const ServerOptions& options() const = 0;
  // Null when there is none; then `status` is 404, or 405 with `allow`.
  [[nodiscard]] virtual const Handler* find_route(unsigned planes, std::string_view method,
                                                  std::string_view path, int* status,
                                                  std::string* allow) const = 0;
  virtual void closed(const class Connection* connection) = 0;
};

// One client's connection. Its reader always has a read outstanding (so that a client that leaves is
// seen while an answer is pending), its writer one write; everything runs on the strand. Requests
// are answered one after the other. An answer is told from a late call for an earlier one by its
// number.
class Connection final : public std::enable_shared_from_this<Connection> {
 public:
  Connection(std::shared_ptr<ConnectionHost> host, Strand strand, std::unique_ptr<ByteStream> stream,
             unsigned planes, std::string peer);

  // From any thread.
  void start();
  void refuse(HttpResponse response);   // instead of start(): answers and closes
  void close();
  void close_when_idle();               // now, or after the answer in progress
  [[nodiscard]] bool answering() const { return answering_.load(); }
  [[nodiscard]] const Strand& strand() const { return strand_; }

  // For Responder, on the strand.
  void respond(uint64_t number, HttpResponse response);
  void start_stream(uint64_t number, int status, const std::string& content_type,
                    const std::vector<std::pair<std::string, std::string>>& headers);
  void write(uint64_t number, std::string_view bytes);
  void end(uint64_t number);
  void on_disconnect(uint64_t number, std::function<void()> callback);
  void dropped(uint64_t number);        // the responder is gone without end() or respond()

 private:
  using Parser = http::request_parser<http::string_body>;

  void read();
  void on_read(boost::system::error_code error, size_t bytes);
  void parse();
  [[nodiscard]] bool check_head();
  void parse_failed(boost::system::error_code error);
  void dispatch();
  void answer_and_close(int status, std::string content_type, std::string body,
                        std::vector<std::pair<std::string, std::string>> headers = {});
  void append_answer(const HttpResponse& response, bool close);
  void complete(bool close);
  void flush();
  void on_written(boost::system::error_code error);
  void set_deadline(double seconds);
  void clear_deadline();
  void watch();
  void kill(const char* reason);

  std::shared_ptr<ConnectionHost> host_;
  Strand strand_;
  std::unique_ptr<ByteStream> stream_;
  unsigned planes_;
  std::string peer_;

  std::array<char, 16384> read_buffer_;
  boost::beast::flat_buffer input_;     // read, not parsed
  std::optional<Parser> parser_;
  bool head_seen_ = false;
  bool reading_ = false;

  uint64_t number_ = 0;                 // of the latest request
  std::atomic<bool> answering_{false};  // it has no complete answer yet
  bool streaming_ = false;
  bool chunked_ = false;
  bool head_only_ = false;              // HEAD
  bool http10_ = false;
  bool keep_alive_ = true;
  uint64_t gone_number_ = 0;            // the request that was pending when the client left
  std::function<void()> gone_;

  std::string out_, in_flight_;
  bool writing_ = false;
  bool closing_ = false;                // close when everything is written
  bool lingering_ = false;              // all is written; the rest of the input is thrown away
  bool peer_done_ = false;              // it has shut down its sending side
  bool hurry_ = false;                  // the server stops: do not linger
  bool dead_ = false;

  asio::steady_timer timer_;
  std::optional<Clock::time_point> deadline_;
  std::optional<Clock::time_point> timer_at_;
};

constexpr size_t kHeadLineBytes = 16384;
constexpr size_t kHeadBytes = 65536;
constexpr size_t kPipelinedBytes = 65536;  // read ahead while an answer is pending
constexpr double kLingerSeconds = 5;

std::string make_uuid() {
  thread_local std::mt19937_64 random(std::random_device{}());
  const uint64_t a = random();
  const uint64_t b = random();
  return fmt::format("{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}", a >> 32, (a >> 16) & 0xffff, a & 0xfff,
                     0x8000 | ((b >> 48) & 0x3fff), b & 0xffffffffffff);
}

// A header's value may quote what a client sent; it must not end the line.
std::string one_line(std::string value) {
  std::replace_if(value.begin(), value.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; },
                  ' ');
  return value;
}

std::string status_line_and_id(int status) {
  const auto reason = http::obsolete_reason(static_cast<http::status>(status));
  return fmt::format("HTTP/1.1 {} {}\r\nRequestUUID: {}\r\n", status,
                     std::string_view(reason.data(), reason.size()), make_uuid());
}

class Exchange final : public Responder {
 public:
  Exchange(std::weak_ptr<Connection> connection, uint64_t number)
      : connection_(std::move(connection)), number_(number) {}
  ~Exchange() override {
    if (!ended_) later([n = number_](Connection& c) { c.dropped(n); });
  }
  void respond(HttpResponse response) override {
    ended_ = true;
    later([n = number_, r = std::move(response)](Connection& c) mutable {
      c.respond(n, std::move(r));
    });
  }
  void start_stream(int status, std::string content_type,
                    std::vector<std::pair<std::string, std::string>> headers) override {
    later([n = number_, status, t = std::move(content_type), h = std::move(headers)](Connection& c) {
      c.start_stream(n, status, t, h);
    });
  }
  void write(std::string bytes) override {
    later([n = number_, b = std::move(bytes)](Connection& c) { c.write(n, b); });
  }
  void end() override {
    ended_ = true;
    later([n = number_](Connection& c) { c.end(n); });
  }
  void on_disconnect(std::function<void()> callback) override {
    if (connection_.expired()) {
      if (!ended_) callback();
      return;
    }
    later([n = number_, f = std::move(callback)](Connection& c) mutable {
      c.on_disconnect(n, std::move(f));
    });
  }

 private:
  // A handler may keep us longer than the server lives, so we own nothing of its io_context; the
  // connection is held while its strand is touched.
  template <typename Call>
  void later(Call call) {
    if (auto connection = connection_.lock()) {
      const Strand& strand = connection->strand();
      asio::post(strand, [c = std::move(connection), call = std::move(call)]() mutable { call(*c); });
    }
  }

  std::weak_ptr<Connection> connection_;
  uint64_t number_;
  std::atomic<bool> ended_{false};
};

Connection::Connection(std::shared_ptr<ConnectionHost> host, Strand strand,
                       std::unique_ptr<ByteStream> stream, unsigned planes, std::string peer)
    : host_(std::move(host)),
      strand_(strand),
      stream_(std::move(stream)),
      planes_(planes),
      peer_(std::move(peer)),
      timer_(strand) {}

void Connection::start() {
  asio::post(strand_, [self = shared_from_this()] {
    self->set_deadline(self->host_->options().read_seconds);
    self->stream_->handshake([self](boost::system::error_code error) {
      if (error) return self->kill("handshake failed");
      self->read();
    });
  });
}

void Connection::refuse(HttpResponse response) {
  asio::post(strand_, [self = shared_from_this(), r = std::move(response)] {
    self->set_deadline(kLingerSeconds);
    self->stream_->handshake([self, r](boost::system::error_code error) {
      if (error) return self->kill("handshake failed");
      self->closing_ = true;
      self->append_answer(r, true);
      self->flush();
      self->read();
    });
  });
}

void Connection::close() {
  asio::post(strand_, [self = shared_from_this()] { self->kill("server stops"); });
}

void Connection::close_when_idle() {
  asio::post(strand_, [self = shared_from_this()] {
    self->keep_alive_ = false;
    self->hurry_ = true;
    if (self->answering_) return;
    if (self->writing_) self->closing_ = true;
    else self->kill("server stops");
  });
}

void Connection::read() {
  if (dead_ || reading_) return;
  if (answering_ && input_.size() >= kPipelinedBytes) return;  // complete() reads on
  reading_ = true;
  stream_->read_some(asio::buffer(read_buffer_),
                     [self = shared_from_this()](boost::system::error_code error, size_t bytes) {
                       self->reading_ = false;
                       self->on_read(error, bytes);
                     });
}

void Connection::on_read(boost::system::error_code error, size_t bytes) {
  if (dead_) return;
  if (error) {
    // A client that has shut down its sending side is taken as gone, unless its answer is on the way.
    if (!answering_ && writing_) {
      closing_ = true;
      peer_done_ = true;
      return;
    }
    return kill("client left");
  }
  if (!closing_) {
    // Not read into input_ directly: parsing may move it while a read is outstanding.
    input_.commit(asio::buffer_copy(input_.prepare(bytes), asio::buffer(read_buffer_, bytes)));
    if (!answering_) {
      if (parser_ && head_seen_) set_deadline(host_->options().read_seconds);
      parse();
    }
  }
  read();
}

void Connection::parse() {
  while (!answering_ && !closing_ && !dead_ && input_.size() > 0) {
    if (!parser_) {
      // Blank lines before a request are allowed (RFC 9112, 2.2).
      const char* data = static_cast<const char*>(input_.data().data());
      if (*data == '\r' || *data == '\n') {
        input_.consume(1);
        continue;
      }
      if (out_.size() > static_cast<size_t>(host_->options().max_buffered_bytes)) return;
      parser_.emplace();
      parser_->eager(true);
      parser_->header_limit(static_cast<uint32_t>(kHeadBytes));
      parser_->body_limit(static_cast<uint64_t>(host_->options().max_body_bytes));
      head_seen_ = false;
      set_deadline(host_->options().read_seconds);
    }
    boost::system::error_code error;
    const size_t used = parser_->put(input_.data(), error);
    input_.consume(used);
    if (error == http::error::need_more) error = {};
    if (error) return parse_failed(error);
    if (parser_->is_header_done() && !head_seen_) {
      head_seen_ = true;
      if (!check_head()) return;
    }
    if (parser_->is_done()) {
      dispatch();
    } else if (used == 0) {
      return;
    }
  }
}

bool Connection::check_head() {
  const auto& head = parser_->get();
  for (const auto& field : head) {
    if (field.name_string().size() + field.value().size() + 4 > kHeadLineBytes) {
      answer_and_close(431, "", "");
      return false;
    }
  }
  http10_ = head.version() < 11;
  const auto expect = head[http::field::expect];
  if (!parser_->is_done() && boost::beast::iequals(expect, "100-continue")) {
    out_ += "HTTP/1.1 100 Continue\r\n\r\n";
    flush();
  }
  return true;
}

void Connection::parse_failed(boost::system::error_code error) {
  if (error == http::error::header_limit) return answer_and_close(431, "", "");
  if (error == http::error::body_limit || error == http::error::buffer_overflow)
    return answer_and_close(413, "application/json",
                            fmt::format("{{\"message\":\"Request body too large. Maximum allowed size "
                                        "is {}MB.\"}}",
                                        host_->options().max_body_bytes >> 20));
  answer_and_close(400, "application/json",
                   fmt::format("{{\"error\":\"Malformed HTTP request: {}\",\"error_type\":\"Bad "
                               "Request\"}}",
                               error.message()));
}

void Connection::dispatch() {
  auto message = parser_->release();
  parser_.reset();
  clear_deadline();
  http10_ = message.version() < 11;
  keep_alive_ = keep_alive_ && message.keep_alive();
  ++number_;
  answering_ = true;
  streaming_ = false;

  HttpRequest request;
  request.method = std::string(message.method_string());
  const std::string target(message.target());
  const size_t mark = target.find('?');
  request.path = target.substr(0, mark);
  if (mark != std::string::npos) request.query = target.substr(mark + 1);
  for (const auto& field : message) {
    std::string name(field.name_string());
    std::transform(name.begin(), name.end(), name.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    request.headers.emplace_back(std::move(name), std::string(field.value()));
  }
  request.body = std::move(message.body());
  request.peer = peer_;
  head_only_ = request.method == "HEAD";

  int status = 404;
  std::string allow;
  const Handler* handler =
      host_->find_route(planes_, head_only_ ? "GET" : request.method, request.path, &status, &allow);
  if (handler == nullptr) {
    HttpResponse none{.status = status, .content_type = "", .body = {}, .headers = {}};
    if (!allow.empty()) none.headers.emplace_back("Allow", allow);
    return respond(number_, std::move(none));
  }
  auto exchange = std::make_shared<Exchange>(weak_from_this(), number_);
  try {
    (*handler)(std::move(request), exchange);
  } catch (const std::exception& e) {
    log_error("HTTP handler failed: {}", e.what());
    exchange->respond({.status = 500, .content_type = "text/plain", .body = "Server internal error",
                       .headers = {}});
  }
}

void Connection::answer_and_close(int status, std::string content_type, std::string body,
                                  std::vector<std::pair<std::string, std::string>> headers) {
  parser_.reset();
  head_only_ = false;
  closing_ = true;
  append_answer({.status = status, .content_type = std::move(content_type), .body = std::move(body),
                 .headers = std::move(headers)},
                true);
  flush();
}

void Connection::append_answer(const HttpResponse& response, bool close) {
  std::string head = status_line_and_id(response.status);
  if (!response.body.empty() && !response.content_type.empty())
    head += fmt::format("Content-Type: {}\r\n", one_line(response.content_type));
  head += fmt::format("Content-Length: {}\r\n", response.body.size());
  if (close) head += "Connection: close\r\n";
  for (const auto& [name, value] : response.headers)
    head += fmt::format("{}: {}\r\n", name, one_line(value));
  out_ += head;
  out_ += "\r\n";
  if (!head_only_) out_ += response.body;
}

void Connection::respond(uint64_t number, HttpResponse response) {
  if (dead_ || !answering_ || number != number_ || streaming_) return;
  const bool close = host_->options().close_after_answer || !keep_alive_ || http10_;
  append_answer(response, close);
  complete(close);
}

void Connection::start_stream(uint64_t number, int status, const std::string& content_type,
                              const std::vector<std::pair<std::string, std::string>>& headers) {
  if (dead_ || !answering_ || number != number_ || streaming_) return;
  streaming_ = true;
  chunked_ = !http10_;
  std::string head = status_line_and_id(status);
  head += fmt::format("Content-Type: {}\r\n", one_line(content_type));
  if (chunked_) head += "Transfer-Encoding: chunked\r\n";
  if (!chunked_ || !keep_alive_) head += "Connection: close\r\n";
  for (const auto& [name, value] : headers) head += fmt::format("{}: {}\r\n", name, one_line(value));
  out_ += head;
  out_ += "\r\n";
  flush();
}

void Connection::write(uint64_t number, std::string_view bytes) {
  if (dead_ || !answering_ || number != number_ || !streaming_ || bytes.empty() || head_only_) return;
  if (chunked_) out_ += fmt::format("{:x}\r\n", bytes.size());
  out_ += bytes;
  if (chunked_) out_ += "\r\n";
  if (out_.size() + in_flight_.size() > static_cast<size_t>(host_->options().max_buffered_bytes)) {
    log_warn("HTTP client {} reads too slowly: {} bytes of its stream are waiting, at most {}; its "
             "connection is cut",
             peer_, out_.size() + in_flight_.size(), host_->options().max_buffered_bytes);
    return kill("slow reader");
  }
  flush();
}

void Connection::end(uint64_t number) {
  if (dead_ || !answering_ || number != number_ || !streaming_) return;
  if (chunked_ && !head_only_) out_ += "0\r\n\r\n";
  complete(!chunked_ || !keep_alive_);
}

void Connection::on_disconnect(uint64_t number, std::function<void()> callback) {
  if (number == gone_number_) return callback();
  if (!dead_ && answering_ && number == number_) gone_ = std::move(callback);
}

void Connection::dropped(uint64_t number) {
  if (dead_ || !answering_ || number != number_) return;
  if (streaming_) return kill("answer was given up");
  respond(number, {.status = 500, .content_type = "text/plain", .body = "Server internal error",
                   .headers = {}});
}

void Connection::complete(bool close) {
  answering_ = false;
  streaming_ = false;
  gone_ = nullptr;
  if (close) {
    closing_ = true;
    input_.consume(input_.size());
  }
  flush();
  if (dead_ || closing_) return read();
  // Requests already here are parsed after the current call, so that none recurses.
  asio::post(strand_, [self = shared_from_this()] {
    if (self->dead_ || self->answering_) return;
    self->parse();
    self->read();
  });
}

void Connection::flush() {
  if (dead_ || writing_) return;
  if (out_.empty()) {
    if (closing_) {
      if (peer_done_ || hurry_) return kill("done");
      if (!lingering_) {
        lingering_ = true;
        stream_->shut_down_send();
        set_deadline(kLingerSeconds);
      }
    } else if (!answering_ && !parser_) {
      set_deadline(host_->options().idle_seconds);
    } else if (answering_) {
      clear_deadline();
    }
    return;
  }
  writing_ = true;
  in_flight_.clear();
  in_flight_.swap(out_);
  set_deadline(host_->options().write_seconds);
  stream_->write_all(asio::buffer(in_flight_),
                     [self = shared_from_this()](boost::system::error_code error, size_t) {
                       self->on_written(error);
                     });
}

void Connection::on_written(boost::system::error_code error) {
  writing_ = false;
  if (dead_) return;
  if (error) return kill("client left");
  in_flight_.clear();
  if (in_flight_.capacity() > (1 << 20)) in_flight_.shrink_to_fit();
  flush();
  if (parser_ && !dead_ && !writing_) set_deadline(host_->options().read_seconds);
  if (!dead_ && !answering_ && !closing_ && input_.size() > 0) parse();
}

void Connection::set_deadline(double seconds) {
  if (dead_) return;
  deadline_ = Deadline::in_seconds(seconds).when();
  if (!timer_at_ || *timer_at_ > *deadline_) watch();
}

void Connection::clear_deadline() { deadline_.reset(); }

// The timer sleeps to the deadline it last saw; deadlines that move away cost nothing until then.
void Connection::watch() {
  timer_at_ = deadline_;
  timer_.expires_at(*timer_at_);
  timer_.async_wait([weak = weak_from_this()](boost::system::error_code error) {
    auto self = weak.lock();
    if (!self || error || self->dead_) return;
    self->timer_at_.reset();
    if (!self->deadline_) return;
    if (Clock::now() >= *self->deadline_) return self->kill("time-out");
    self->watch();
  });
}

void Connection::kill(const char* reason) {
  if (dead_) return;
  dead_ = true;
  log_debug("HTTP connection {} closed: {}", peer_, reason);
  auto self = shared_from_this();
  timer_.cancel();
  stream_->close();
  if (answering_) {
    gone_number_ = number_;
    answering_ = false;
    if (auto callback = std::exchange(gone_, nullptr)) {
      try {
        callback();
      } catch (const std::exception& e) {
        log_error("HTTP disconnect callback failed: {}", e.what());
      }
    }
  }
  host_->closed(this);
}

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
