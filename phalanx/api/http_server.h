#pragma once

// (Boost stays in .cc files.) One listener per plane, one or more io threads for all.

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/base/clock.h"
#include "phalanx/base/unique_fd.h"

namespace phalanx::api {

struct HttpRequest {
  std::string method;
  std::string path;                                          // without the query
  std::string query;
  std::vector<std::pair<std::string, std::string>> headers;  // names lower-cased
  std::string body;
  std::string peer;                                          // "127.0.0.1:51234"
  [[nodiscard]] std::string_view header(std::string_view lower_name) const;
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers;
};

// How a handler answers, now or later, from any thread. Exactly one of respond(), or
// start_stream() followed by write()... end(). Once the client is gone the calls have no effect.
class Responder {
 public:
  virtual ~Responder() = default;
  virtual void respond(HttpResponse response) = 0;
  virtual void start_stream(int status, std::string content_type) = 0;
  virtual void write(std::string bytes) = 0;
  virtual void end() = 0;
  // Called once, from an io thread, if the client leaves before the answer is complete.
  virtual void on_disconnect(std::function<void()> callback) = 0;
};

// Called on an io thread; long work (tokenising a big prompt) should go to `Server::post_work`.
using Handler = std::function<void(HttpRequest, std::shared_ptr<Responder>)>;

enum Plane : unsigned { kBusiness = 1, kManagement = 2, kMetrics = 4 };

struct ListenerOptions {
  std::string address;
  uint16_t port = 0;            // 0: any, see ports()
  unsigned planes = 0;          // which planes this listener serves
};

struct ServerOptions {
  std::vector<ListenerOptions> listeners;
  int io_threads = 1;
  int work_threads = 1;
  int64_t max_body_bytes = 40 << 20;
  int64_t max_connections = 3100;
  double read_seconds = 60;
  double write_seconds = 600;
  double idle_seconds = 60;
  int64_t max_buffered_bytes = 8 << 20;  // unread stream bytes before a slow reader is cut
};

class Server {
 public:
  // Binds every listener (so that a taken port is known before a model loads) but accepts nothing.
  // Throws Error(kUnavailable) that names plane, address, port, the reason and, for an address that
  // is not local, the local ones.
  explicit Server(const ServerOptions& options);
  ~Server();
  // Before start(). `pattern`: "/v1/models/{name}" puts the part into HttpRequest::query as
  // "name=..." is NOT done; handlers parse request.path themselves. Exact match, or prefix match
  // when it ends in '*'.
  void route(Plane plane, std::string method, std::string pattern, Handler handler);
  void start();
  // Stops accepting; waits for open answers until the deadline, then closes all.
  void stop(Deadline deadline);
  void post_work(std::function<void()> work);
  [[nodiscard]] std::vector<uint16_t> ports() const;  // by listener

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace phalanx::api
