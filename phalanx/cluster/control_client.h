#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "phalanx/base/clock.h"
#include "phalanx/base/error.h"
#include "phalanx/cluster/credentials.h"

namespace phalanx::control::v1 {
class FromNode;
class FromMaster;
}  // namespace phalanx::control::v1

namespace phalanx::cluster {

// One stream from a slave to the master: messages, without meaning. Thread-safe, except that the
// destructor must be the last call.
class ControlClient {
 public:
  // Called from gRPC's threads, one call at a time, with no lock held. Must not block.
  class Handler {
   public:
    virtual ~Handler() = default;
    virtual void on_message(const control::v1::FromMaster& message) = 0;
    // Once, last: kUnavailable with a short reason ("Connection refused") when the master cannot be
    // reached or is gone; kPermissionDenied when its certificate was refused by this side.
    virtual void on_end(Code code, const std::string& reason) = 0;
  };
  // Starts to connect at once and never retries. Ignores HTTP proxies of the environment.
  ControlClient(const std::string& address, uint16_t port, const ControlSecurity& security,
                Handler& handler);
  // Cancels the stream if it is open and waits until gRPC has let go of it.
  ~ControlClient();

  // Queues a message; nothing happens after the end. A droppable message (heartbeat) is left out
  // while others wait.
  void send(const control::v1::FromNode& message, bool droppable = false);
  // Says that nothing more will be sent, then waits for the master to end the stream.
  void finish(Deadline deadline);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace phalanx::cluster
