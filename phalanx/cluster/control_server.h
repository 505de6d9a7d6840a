#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "phalanx/cluster/credentials.h"

namespace phalanx::control::v1 {
class FromNode;
class FromMaster;
}  // namespace phalanx::control::v1

namespace phalanx::cluster {

using StreamId = uint64_t;  // never 0, never used again
inline constexpr int kMaxControlMessageBytes = 4 << 20;

// The master's listening end: streams of messages, without meaning. Thread-safe.
class ControlServer {
 public:
  // Called from gRPC's threads, one call at a time for one stream, with no lock held. Must not
  // block. After on_end nothing more comes for that stream.
  class Handler {
   public:
    virtual ~Handler() = default;
    virtual void on_open(StreamId stream, const std::string& peer) = 0;
    virtual void on_message(StreamId stream, const control::v1::FromNode& message) = 0;
    virtual void on_end(StreamId stream) = 0;
  };
  struct Options {
    std::string address;        // the only one it binds
    uint16_t port = 0;
    size_t max_streams = 16;    // further ones are refused
    ControlSecurity security;   // a join is refused unless the certificate is of the node it names
  };
  // Listens at once. Throws Error(kUnavailable) naming endpoint, reason and who holds the port.
  // `handler` must outlive this object.
  ControlServer(const Options& options, Handler& handler);
  // Ends all streams; no call of the handler runs or comes afterwards.
  ~ControlServer();

  // Queues a message; nothing happens for a stream that has ended. A droppable message (heartbeat)
  // is left out while others wait.
  void send(StreamId stream, const control::v1::FromMaster& message, bool droppable = false);
  // Ends the stream after what is queued has been sent.
  void finish(StreamId stream);
  // Ends it at once.
  void cancel(StreamId stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace phalanx::cluster
