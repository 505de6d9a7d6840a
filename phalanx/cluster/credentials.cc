#include "phalanx/cluster/credentials.h"

#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>

namespace phalanx::cluster {

Credentials make_credentials() {
  return {.server = grpc::InsecureServerCredentials(),
          .channel = grpc::InsecureChannelCredentials()};
}

}  // namespace phalanx::cluster
