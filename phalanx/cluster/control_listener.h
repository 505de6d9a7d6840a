#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "phalanx/base/unique_fd.h"

namespace phalanx::cluster {

// The master's listening socket, since gRPC has no limit of connections. Hands over what it accepts
// and keeps count: beyond `max_unproved` connections that opened no stream yet, the oldest is
// closed (a true peer speaks at once, so it is the least likely to be one). Thread-safe.
class ControlListener {
 public:
  struct Options {
    std::string address;  // the only one it binds
    uint16_t port = 0;
    size_t max_unproved = 64;
  };
  using Take = std::function<void(UniqueFd connection)>;

  // Listens at once, and calls `take` from its own thread after start(). Throws
  // Error(kUnavailable) naming endpoint and reason.
  explicit ControlListener(const Options& options);
  ~ControlListener();
  void start(Take take);

  // The connection from this port of its peer has opened a stream: it is kept until it ends.
  void proved(uint16_t peer_port);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace phalanx::cluster
