#include "phalanx/cluster/host_probe.h"

#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>

#include "phalanx/base/clock.h"
#include "phalanx/base/unique_fd.h"

namespace phalanx::cluster {
namespace {

constexpr double kProbeSeconds = 0.3;
constexpr const char* kDiscardPort = "9";

}  // namespace

bool host_answers(const std::string& address) {
  addrinfo hints{};
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (::getaddrinfo(address.c_str(), kDiscardPort, &hints, &found) != 0) return false;
  const UniqueFd fd(::socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  const int result = ::connect(fd.get(), found->ai_addr, found->ai_addrlen);
  int error = result == 0 ? 0 : errno;
  ::freeaddrinfo(found);
  if (error == EINPROGRESS) {
    pollfd wait{fd.get(), POLLOUT, 0};
    const Deadline deadline = Deadline::in_seconds(kProbeSeconds);
    while (::poll(&wait, 1, deadline.poll_ms(1000)) < 0 && errno == EINTR && !deadline.passed()) {
    }
    socklen_t size = sizeof error;
    if (wait.revents == 0 || ::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size) != 0)
      return false;
  }
  return error == 0 || error == ECONNREFUSED;
}

}  // namespace phalanx::cluster
