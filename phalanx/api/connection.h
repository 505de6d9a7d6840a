#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "phalanx/api/access.h"
#include "phalanx/api/byte_stream.h"
#include "phalanx/api/http_message.h"
#include "phalanx/api/http_server.h"
#include "phalanx/api/request_parser.h"

namespace phalanx::api {

// What a connection needs of its server. Called on the connection's strand.
class ConnectionHost {
 public:
  virtual ~ConnectionHost() = default;
  [[nodiscard]] virtual const ServerOptions& options() const = 0;
  // Null when there is none; then `status` is 404, or 405 with `allow`.
  [[nodiscard]] virtual const Handler* find_route(unsigned planes, std::string_view method,
                                                  std::string_view path, int* status,
                                                  std::string* allow) const = 0;
  // The answer to a request that must not go on, or nothing. `head` has no body yet; `user` receives
  // who asks.
  [[nodiscard]] virtual std::optional<HttpResponse> refuse(const HttpRequest& head,
                                                           std::string* user) = 0;
  // Header lines that every answer to `head` carries.
  [[nodiscard]] virtual std::string header_lines(const HttpRequest& head) const = 0;
  // Takes and gives back one of the places for requests in progress.
  [[nodiscard]] virtual bool take_place() = 0;
  virtual void give_back_place() = 0;
  virtual void finished(const AccessRecord& record) = 0;
  // Tells the log, not too often.
  virtual void handshake_failed(const std::string& sentence) = 0;
  virtual void closed(const class Connection* connection) = 0;
};

// One client's connection. Its reader always has a read outstanding (so that a client that leaves is
// seen while an answer is pending), its writer one write; everything runs on the stream's strand.
// Requests are answered one after the other. An answer is told from a late call for an earlier one
// by its number.
class Connection final : public std::enable_shared_from_this<Connection> {
 public:
  Connection(std::shared_ptr<ConnectionHost> host, std::unique_ptr<ByteStream> stream, unsigned planes,
             std::string peer);

  // From any thread.
  void start();
  void refuse(HttpResponse response);  // instead of start(): answers and closes
  void close();
  void close_when_idle();              // now, or after the answer in progress
  [[nodiscard]] bool answering() const { return answering_.load(); }
  void post(std::function<void()> work) { stream_->post(std::move(work)); }

  // For Responder, on the strand.
  void respond(uint64_t number, HttpResponse response);
  void start_stream(uint64_t number, int status, const std::string& content_type,
                    const std::vector<std::pair<std::string, std::string>>& headers);
  void write(uint64_t number, std::string_view bytes);
  void end(uint64_t number);
  void on_disconnect(uint64_t number, std::function<void()> callback);
  void dropped(uint64_t number);       // the responder is gone without end() or respond()

 private:
  void read();
  void on_read(std::error_code error, size_t bytes);
  void parse();
  [[nodiscard]] bool begin_turn();
  [[nodiscard]] double body_seconds() const;
  void handshake_failed(const std::string& failure);
  void dispatch();
  void answer_and_close(HttpResponse response);
  void append_answer(const HttpResponse& response, bool close);
  void complete(bool close);
  void flush();
  void write_on();
  void on_written(std::error_code error, size_t bytes);
  void set_deadline(double seconds);
  void clear_deadline();
  void watch();
  void kill(const char* reason);
  [[nodiscard]] std::string head_of_answer(int status);
  void end_turn(int status);

  std::shared_ptr<ConnectionHost> host_;
  std::unique_ptr<ByteStream> stream_;
  unsigned planes_;
  std::string peer_;

  std::array<char, 16384> read_buffer_;
  std::string input_;                   // read, not parsed
  std::optional<RequestParser> parser_;
  bool head_seen_ = false;
  bool reading_ = false;

  uint64_t number_ = 0;                 // of the latest request
  std::atomic<bool> answering_{false};  // it has no complete answer yet
  bool streaming_ = false;
  bool chunked_ = false;
  bool head_only_ = false;              // HEAD
  bool http10_ = false;
  bool keep_alive_ = true;
  // The request in progress, from its head on.
  struct Turn {
    bool open = false;
    bool has_place = false;
    AccessRecord record;
    std::string header_lines;  // of every answer to it
    Clock::time_point begun;
    bool answered = false;     // the answer has begun
  };
  Turn turn_;
  Clock::time_point body_begun_;
  int64_t body_bytes_ = 0;
  uint64_t gone_number_ = 0;            // the request that was pending when the client left
  std::function<void()> gone_;

  std::string out_, in_flight_;
  size_t flown_ = 0;                    // of in_flight_
  bool writing_ = false;
  bool closing_ = false;                // close when everything is written
  bool lingering_ = false;              // all is written; the rest of the input is thrown away
  bool peer_done_ = false;              // it has shut down its sending side
  bool hurry_ = false;                  // the server stops: do not linger
  bool dead_ = false;

  std::optional<Clock::time_point> deadline_;
  std::optional<Clock::time_point> timer_at_;
};

}  // namespace phalanx::api
