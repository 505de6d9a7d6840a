#include "phalanx/comm/tcp/tcp_link.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <vector>

namespace phalanx::comm {

namespace {
constexpr size_t kMaxPeek = 64 << 10;
}

TcpLink::TcpLink(UniqueFd fd, uint64_t generation) : fd_(std::move(fd)), generation_(generation) {}

int64_t TcpLink::send_some(std::span<const iovec> runs) {
  msghdr message{};
  message.msg_iov = const_cast<iovec*>(runs.data());
  message.msg_iovlen = runs.size();
  const ssize_t count = ::sendmsg(fd_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (count >= 0) return count;
  if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return 0;
  error_ = errno;
  return -1;
}

int64_t TcpLink::recv_some(std::span<const iovec> runs) {
  msghdr message{};
  message.msg_iov = const_cast<iovec*>(runs.data());
  message.msg_iovlen = runs.size();
  const ssize_t count = ::recvmsg(fd_.get(), &message, MSG_DONTWAIT);
  if (count > 0) return count;
  if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return 0;
  error_ = count == 0 ? 0 : errno;
  return -1;
}

std::string TcpLink::why() const {
  if (error_ == 0) return "the connection was closed";
  return fmt::format("the connection failed: {} (errno {})", std::strerror(error_), error_);
}

bool TcpLink::begin_frame() {
  State idle = State::kIdle;
  return state_.compare_exchange_strong(idle, State::kWriting, std::memory_order_acq_rel);
}

void TcpLink::end_frame() {
  State writing = State::kWriting;
  state_.compare_exchange_strong(writing, State::kIdle, std::memory_order_acq_rel);
}

short TcpLink::events(bool receiving, bool sending) const {
  return static_cast<short>(POLLRDHUP | (receiving ? POLLIN : 0) | (sending ? POLLOUT : 0));
}

Link::Peer TcpLink::look(Farewell* farewell) {
  pollfd entry{fd_.get(), POLLRDHUP, 0};
  if (::poll(&entry, 1, 0) <= 0 || entry.revents == 0) return Peer::kAlive;
  std::vector<std::byte> unread(kMaxPeek);
  const ssize_t count =
      ::recv(fd_.get(), unread.data(), unread.size(), MSG_PEEK | MSG_DONTWAIT);
  if (count == static_cast<ssize_t>(unread.size())) return Peer::kUnread;
  if (count >= static_cast<ssize_t>(kFarewellBytes)) {
    const auto tail =
        std::span<const std::byte>(unread).subspan(count - kFarewellBytes, kFarewellBytes);
    if (auto found = decode_farewell(tail, generation_)) {
      *farewell = *found;
      return found->clean ? Peer::kLeft : Peer::kGone;
    }
  }
  error_ = count < 0 && errno != EAGAIN ? errno : 0;
  *farewell = Farewell{};
  return Peer::kGone;
}

void TcpLink::farewell(const FarewellFrame& frame) noexcept {
  const State before = state_.exchange(State::kClosed, std::memory_order_acq_rel);
  if (before == State::kClosed) return;
  // A receiver in the middle of a frame would take the farewell for payload: then only the end of
  // the stream tells it.
  if (before == State::kIdle)
    (void)!::send(fd_.get(), frame.data(), frame.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  ::shutdown(fd_.get(), SHUT_RDWR);
}

}  // namespace phalanx::comm
