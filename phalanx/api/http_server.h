#pragma once

// (Boost stays in .cc files.) One listener per plane, one or more io threads for all.

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "phalanx/api/access.h"
#include "phalanx/api/gate.h"
#include "phalanx/api/http_message.h"
#include "phalanx/base/clock.h"

namespace phalanx::net {
class TlsContext;
}

namespace phalanx::api {

struct ListenerOptions {
  std::string address;
  uint16_t port = 0;            // 0: any, see ports()
  unsigned planes = 0;          // which planes this listener serves
  // Asked for each new connection; null: plain HTTP. From an io thread, must not block.
  std::function<std::shared_ptr<const net::TlsContext>()> tls;
};

struct ServerOptions {
  std::vector<ListenerOptions> listeners;
  int io_threads = 1;
  int work_threads = 1;
  int64_t max_body_bytes = 40 << 20;
  // Per listener that serves the business plane; the others take max(100, a tenth of it).
  int64_t max_connections = 3100;
  // POST requests in progress on listeners that serve the business plane; one more gets 503 with
  // Retry-After at once.
  int64_t max_requests = 3000;
  double handshake_seconds = 10;
  double read_seconds = 60;     // for a head, and for the next piece of a body
  double body_bytes_per_second = 4096;  // the least, after read_seconds, that a body must come with
  double write_seconds = 60;    // in which a client must take some byte of what is being sent
  double idle_seconds = 60;     // between requests
  bool close_after_answer = true;  // `Connection: close` on every answer that is no stream
  int64_t max_buffered_bytes = 1 << 20;  // unread stream bytes before a slow reader is cut
  GateOptions gate;
  // Called for every request that is over, from an io thread; must not block.
  std::function<void(const AccessRecord&)> on_finished;
};

class Server {
 public:
  // Binds every listener (so that a taken port is known before a model loads) but accepts nothing.
  // Throws Error(kUnavailable) that names plane, address, port, the reason and, for an address that
  // is not local, the local ones.
  explicit Server(const ServerOptions& options);
  ~Server();
  // Before start(). `pattern` matches exactly, or as a prefix when it ends in '*'; the first match in
  // order of mounting wins, and handlers parse request.path themselves. HEAD is answered by GET's
  // handler without the body. A path without a route: 404, one without this method: 405.
  void route(Plane plane, std::string method, std::string pattern, Handler handler);
  // Every route that is mounted from now on has the handler that `decorator` makes of its own.
  using Decorator = std::function<Handler(Plane, const std::string& method,
                                          const std::string& pattern, Handler)>;
  void decorate(Decorator decorator);
  // Listens and accepts. Throws kUnavailable.
  void start();
  // Stops accepting; waits for open answers until the deadline, then closes all. Afterwards no
  // handler, callback or posted work runs any more. Idempotent.
  void stop(Deadline deadline);
  // Runs `work` on a work thread; after stop() it is dropped.
  void post_work(std::function<void()> work);
  [[nodiscard]] std::vector<uint16_t> ports() const;  // by listener

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace phalanx::api
