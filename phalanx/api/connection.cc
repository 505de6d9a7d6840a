#include "phalanx/api/connection.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/beast/http/status.hpp>
#include <chrono>
#include <exception>
#include <span>

#include "phalanx/api/listener.h"
#include "phalanx/base/log.h"

namespace phalanx::api {
namespace {

namespace http = boost::beast::http;

constexpr size_t kPipelinedBytes = 65536;  // read ahead while an answer is pending
constexpr double kLingerSeconds = 5;
constexpr int kClientLeft = 499;  // in logs only

// A header's value may quote what a client sent; it must not end the line.
std::string one_line(std::string value) {
  std::replace_if(value.begin(), value.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; },
                  ' ');
  return value;
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
      Connection& strand = *connection;
      strand.post([c = std::move(connection), call = std::move(call)]() mutable { call(*c); });
    }
  }

  std::weak_ptr<Connection> connection_;
  uint64_t number_;
  std::atomic<bool> ended_{false};
};

}  // namespace

Connection::Connection(std::shared_ptr<ConnectionHost> host, std::unique_ptr<ByteStream> stream,
                       unsigned planes, std::string peer)
    : host_(std::move(host)),
      stream_(std::move(stream)),
      planes_(planes),
      peer_(std::move(peer)) {}

void Connection::start() {
  stream_->post([self = shared_from_this()] {
    self->set_deadline(self->host_->options().handshake_seconds);
    self->stream_->handshake([self](const std::string& failure) {
      if (!failure.empty()) return self->handshake_failed(failure);
      if (self->dead_) return;
      self->set_deadline(self->host_->options().read_seconds);
      self->read();
    });
  });
}

void Connection::refuse(HttpResponse response) {
  stream_->post([self = shared_from_this(), r = std::move(response)] {
    self->set_deadline(kLingerSeconds);
    self->stream_->handshake([self, r](const std::string& failure) {
      if (!failure.empty()) return self->handshake_failed(failure);
      if (self->dead_) return;
      self->closing_ = true;
      self->append_answer(r, true);
      self->flush();
      self->read();
    });
  });
}

void Connection::handshake_failed(const std::string& failure) {
  host_->handshake_failed(fmt::format("TLS handshake with {} on the {} plane failed: {}", peer_,
                                      plane_names(planes_), failure));
  if (dead_) return;
  // Closing at once, with unread bytes, would reset the connection before the client reads why.
  closing_ = true;
  lingering_ = true;
  set_deadline(kLingerSeconds);
  read();
}

void Connection::close() {
  stream_->post([self = shared_from_this()] { self->kill("server stops"); });
}

void Connection::close_when_idle() {
  stream_->post([self = shared_from_this()] {
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
  stream_->read_some(read_buffer_,
                     [self = shared_from_this()](std::error_code error, size_t bytes) {
                       self->reading_ = false;
                       self->on_read(error, bytes);
                     });
}

void Connection::on_read(std::error_code error, size_t bytes) {
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
    input_.append(read_buffer_.data(), bytes);
    if (!answering_) {
      body_bytes_ += static_cast<int64_t>(bytes);
      if (parser_ && head_seen_) set_deadline(body_seconds());
      parse();
    }
  }
  read();
}

void Connection::parse() {
  size_t at = 0;  // in input_
  const auto rest = [&] { return std::span<const char>(input_).subspan(at); };
  while (!answering_ && !closing_ && !dead_ && at < input_.size()) {
    if (!parser_) {
      // Blank lines before a request are allowed (RFC 9112, 2.2).
      if (input_[at] == '\r' || input_[at] == '\n') {
        ++at;
        continue;
      }
      if (out_.size() > static_cast<size_t>(host_->options().max_buffered_bytes)) break;
      parser_.emplace(
          RequestParser::Limits{.body_bytes = host_->options().max_body_bytes});
      head_seen_ = false;
      set_deadline(host_->options().read_seconds);
    }
    size_t used = 0;
    const auto state = parser_->put(rest(), &used);
    at += used;
    switch (state) {
      case RequestParser::State::kHead:
      case RequestParser::State::kBody:
        break;
      case RequestParser::State::kDone:
        if (!head_seen_ && !begin_turn()) continue;
        input_.erase(0, at);
        at = 0;
        dispatch();
        continue;
      case RequestParser::State::kHeadTooLarge:
        answer_and_close({.status = 431, .content_type = "", .body = {}, .headers = {}});
        continue;
      case RequestParser::State::kBodyTooLarge:
        answer_and_close({.status = 413,
                          .body = fmt::format("{{\"message\":\"Request body too large. Maximum "
                                              "allowed size is {}MB.\"}}",
                                              host_->options().max_body_bytes >> 20),
                          .headers = {}});
        continue;
      case RequestParser::State::kMalformed:
        answer_and_close({.status = 400,
                          .body = fmt::format("{{\"error\":\"Malformed HTTP request: {}\","
                                              "\"error_type\":\"Bad Request\"}}",
                                              parser_->reason()),
                          .headers = {}});
        continue;
    }
    if (state == RequestParser::State::kBody && !head_seen_) {
      if (!begin_turn()) continue;
      body_begun_ = Clock::now();
      body_bytes_ = 0;
      set_deadline(host_->options().read_seconds);
      if (parser_->expects_continue()) {
        out_ += "HTTP/1.1 100 Continue\r\n\r\n";
        flush();
      }
    }
    if (used == 0) break;
  }
  input_.erase(0, std::min(at, input_.size()));
}

// A slow sender may take as long as its body is long, no longer.
double Connection::body_seconds() const {
  const ServerOptions& o = host_->options();
  const auto since = std::chrono::duration<double>(Clock::now() - body_begun_).count();
  const double allowed =
      o.read_seconds + static_cast<double>(body_bytes_) / o.body_bytes_per_second;
  return std::min(o.read_seconds, std::max(0.0, allowed - since));
}

// The head is here: whoever may not ask is told so before the body is read.
bool Connection::begin_turn() {
  head_seen_ = true;
  http10_ = parser_->http10();
  const HttpRequest head = parser_->head();
  turn_ = {};
  turn_.open = true;
  turn_.begun = Clock::now();
  AccessRecord& record = turn_.record;
  record.peer = peer_;
  record.user = stream_->peer_name();
  record.method = head.method;
  record.path = head.path;
  record.request_id = own_request_id(head);
  record.trace = trace_of(head);
  record.planes = planes_;
  turn_.header_lines = host_->header_lines(head);
  if (record.trace.size() == 55 && record.trace[2] == '-')
    turn_.header_lines += fmt::format("traceparent: {}\r\n", record.trace);
  if (auto refusal = host_->refuse(head, &record.user)) {
    answer_and_close(std::move(*refusal));
    return false;
  }
  if ((planes_ & kBusiness) != 0 && head.method == "POST") {
    if (!host_->take_place()) {
      answer_and_close(
          {.status = 503,
           .body = fmt::format("{{\"error\":\"Too many requests: {} are in progress, at most {}. Try "
                               "again later\",\"error_type\":\"Service Unavailable\"}}",
                               host_->options().max_requests, host_->options().max_requests),
           .headers = {{"Retry-After", "1"}}});
      return false;
    }
    turn_.has_place = true;
  }
  return true;
}

void Connection::end_turn(int status) {
  if (!turn_.open) return;
  turn_.open = false;
  if (turn_.has_place) host_->give_back_place();
  turn_.record.status = status;
  turn_.record.seconds = std::chrono::duration<double>(Clock::now() - turn_.begun).count();
  host_->finished(turn_.record);
}

std::string Connection::head_of_answer(int status) {
  const auto reason = http::obsolete_reason(static_cast<http::status>(status));
  const std::string uuid = make_uuid();
  if (!turn_.answered) {
    turn_.answered = true;
    turn_.record.status = status;
    if (turn_.record.request_id.empty()) turn_.record.request_id = uuid;
    turn_.record.first_byte_seconds =
        std::chrono::duration<double>(Clock::now() - turn_.begun).count();
  }
  return fmt::format("HTTP/1.1 {} {}\r\nRequestUUID: {}\r\nX-Request-Id: {}\r\n{}", status,
                     std::string_view(reason.data(), reason.size()), uuid, turn_.record.request_id,
                     turn_.header_lines);
}

void Connection::dispatch() {
  turn_.begun = Clock::now();
  keep_alive_ = keep_alive_ && parser_->keep_alive();
  HttpRequest request = parser_->take();
  parser_.reset();
  clear_deadline();
  ++number_;
  answering_ = true;
  streaming_ = false;
  request.peer = peer_;
  if (turn_.record.request_id.empty()) turn_.record.request_id = make_uuid();
  request.id = turn_.record.request_id;
  request.user = turn_.record.user;
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

void Connection::answer_and_close(HttpResponse response) {
  if (!turn_.open) turn_ = {};  // no head: nothing is known of the request
  parser_.reset();
  head_only_ = false;
  closing_ = true;
  append_answer(response, true);
  end_turn(response.status);
  flush();
}

void Connection::append_answer(const HttpResponse& response, bool close) {
  const size_t before = out_.size();
  std::string head = head_of_answer(response.status);
  if (!response.body.empty() && !response.content_type.empty())
    head += fmt::format("Content-Type: {}\r\n", one_line(response.content_type));
  head += fmt::format("Content-Length: {}\r\n", response.body.size());
  if (close) head += "Connection: close\r\n";
  for (const auto& [name, value] : response.headers)
    head += fmt::format("{}: {}\r\n", name, one_line(value));
  out_ += head;
  out_ += "\r\n";
  if (!head_only_) out_ += response.body;
  turn_.record.bytes += out_.size() - before;
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
  turn_.record.stream = true;
  std::string head = head_of_answer(status);
  head += fmt::format("Content-Type: {}\r\n", one_line(content_type));
  if (chunked_) head += "Transfer-Encoding: chunked\r\n";
  if (!chunked_ || !keep_alive_) head += "Connection: close\r\n";
  for (const auto& [name, value] : headers) head += fmt::format("{}: {}\r\n", name, one_line(value));
  out_ += head;
  out_ += "\r\n";
  turn_.record.bytes += head.size() + 2;
  flush();
}

void Connection::write(uint64_t number, std::string_view bytes) {
  if (dead_ || !answering_ || number != number_ || !streaming_ || bytes.empty() || head_only_) return;
  const size_t before = out_.size();
  if (chunked_) out_ += fmt::format("{:x}\r\n", bytes.size());
  out_ += bytes;
  if (chunked_) out_ += "\r\n";
  turn_.record.bytes += out_.size() - before;
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
    input_.clear();
  }
  flush();
  end_turn(turn_.record.status);
  if (dead_ || closing_) return read();
  // Requests already here are parsed after the current call, so that none recurses.
  stream_->post([self = shared_from_this()] {
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
  flown_ = 0;
  write_on();
}

void Connection::write_on() {
  set_deadline(host_->options().write_seconds);
  stream_->write_some(std::string_view(in_flight_).substr(flown_),
                      [self = shared_from_this()](std::error_code error, size_t bytes) {
                        self->on_written(error, bytes);
                      });
}

void Connection::on_written(std::error_code error, size_t bytes) {
  if (dead_) return;
  if (error) return kill("client left");
  flown_ += bytes;
  if (flown_ < in_flight_.size()) return write_on();
  writing_ = false;
  in_flight_.clear();
  if (in_flight_.capacity() > (1 << 20)) in_flight_.shrink_to_fit();
  flush();
  if (parser_ && !dead_ && !writing_)
    set_deadline(head_seen_ ? body_seconds() : host_->options().read_seconds);
  if (!dead_ && !answering_ && !closing_ && !input_.empty()) parse();
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
  stream_->wake_at(*timer_at_, [weak = weak_from_this()] {
    auto self = weak.lock();
    if (!self || self->dead_) return;
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
  stream_->cancel_wake();
  stream_->close();
  end_turn(answering_ || !turn_.answered ? kClientLeft : turn_.record.status);
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

}  // namespace phalanx::api
