#pragma once

#include <memory>

namespace grpc {
class ChannelCredentials;
class ServerCredentials;
}  // namespace grpc

namespace phalanx::cluster {

struct Credentials {
  std::shared_ptr<grpc::ServerCredentials> server;
  std::shared_ptr<grpc::ChannelCredentials> channel;
};

// How the two ends of the control plane prove themselves. The only place that decides it: in the
// clear today, mutual TLS 1.3 belongs here.
[[nodiscard]] Credentials make_credentials();

}  // namespace phalanx::cluster
