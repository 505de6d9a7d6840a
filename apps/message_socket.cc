#include "apps/message_socket.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>

#include "phalanx/base/error.h"
#include "phalanx/base/json.h"

namespace phalanx::apps {
namespace {

void wait_for(int fd, short events, Deadline deadline, const char* what) {
  for (;;) {
    pollfd p{fd, events, 0};
    const int n = ::poll(&p, 1, deadline.poll_ms(1000));
    if (n > 0) return;
    if (n < 0 && errno != EINTR)
      throw Error(Code::kInternal, fmt::format("poll: {}", std::strerror(errno)));
    if (deadline.passed())
      throw Error(Code::kDeadlineExceeded, fmt::format("no {} before the deadline", what));
  }
}

}  // namespace

std::pair<UniqueFd, UniqueFd> MessageSocket::make_pair() {
  int fds[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) != 0)
    throw Error(Code::kResourceExhausted, fmt::format("socketpair: {}", std::strerror(errno)));
  return {UniqueFd(fds[0]), UniqueFd(fds[1])};
}

void MessageSocket::send(const nlohmann::json& message) {
  const std::string text = message.dump();
  const uint32_t length = static_cast<uint32_t>(text.size());
  std::string frame(sizeof length, '\0');
  std::memcpy(frame.data(), &length, sizeof length);
  frame += text;
  const Deadline deadline = Deadline::in_seconds(10);
  size_t done = 0;
  while (done < frame.size()) {
    const ssize_t n = ::send(fd_.get(), frame.data() + done, frame.size() - done, MSG_NOSIGNAL);
    if (n > 0) {
      done += static_cast<size_t>(n);
    } else if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
      wait_for(fd_.get(), POLLOUT, deadline, "room for a message");
    } else {
      throw Error(Code::kUnavailable, fmt::format("cannot send: {}", std::strerror(errno)));
    }
  }
}

std::optional<nlohmann::json> MessageSocket::receive(Deadline deadline) {
  // The deadline is for the first byte; the rest of a frame follows at once or the peer is broken.
  bool begun = false;
  const auto read_exactly = [&](char* to, size_t count) {
    size_t done = 0;
    while (done < count) {
      const ssize_t n = ::recv(fd_.get(), to + done, count - done, 0);
      if (n > 0) {
        done += static_cast<size_t>(n);
        begun = true;
      } else if (n == 0 || (n < 0 && errno == ECONNRESET)) {
        return false;
      } else if (errno == EAGAIN || errno == EINTR) {
        wait_for(fd_.get(), POLLIN, begun ? Deadline::in_seconds(10) : deadline, "message");
      } else {
        throw Error(Code::kUnavailable, fmt::format("cannot receive: {}", std::strerror(errno)));
      }
    }
    return true;
  };
  uint32_t length = 0;
  if (!read_exactly(reinterpret_cast<char*>(&length), sizeof length)) return std::nullopt;
  if (length > kMaxBytes)
    throw Error(Code::kDataLoss,
                fmt::format("message of {} bytes, expected at most {}", length, kMaxBytes));
  std::string text(length, '\0');
  if (!read_exactly(text.data(), length)) return std::nullopt;
  return parse_json(text, "message between node and rank");
}

}  // namespace phalanx::apps
