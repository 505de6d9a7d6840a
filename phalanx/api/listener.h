#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "phalanx/api/http_server.h"
#include "phalanx/base/unique_fd.h"

namespace boost::asio {
class io_context;
}

namespace phalanx::api {

[[nodiscard]] std::string plane_names(unsigned planes);  // "business+metrics"

// A bound TCP port. It refuses clients until listen().
class Listener {
 public:
  using OnClient = std::function<void(UniqueFd socket, std::string peer)>;

  // Binds. Throws Error(kUnavailable) that names plane, address, port, the reason and, for an
  // address that is not local, the local ones.
  Listener(boost::asio::io_context& io, const ListenerOptions& options);
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  // Throws kUnavailable.
  void listen();
  // Calls `on_client` from an io thread for each client, one at a time, with a non-blocking socket.
  void accept(OnClient on_client);
  // From any thread; no client comes after the io threads have run.
  void close();
  [[nodiscard]] uint16_t port() const;
  [[nodiscard]] const ListenerOptions& options() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace phalanx::api
