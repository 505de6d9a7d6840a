#include "phalanx/comm/tcp/tls_link.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>

namespace phalanx::comm {

namespace {
constexpr size_t kMaxAhead = 64 << 10;
}

TlsLink::TlsLink(std::unique_ptr<net::TlsStream> stream, uint64_t generation)
    : stream_(std::move(stream)), generation_(generation) {}

int64_t TlsLink::send_some(std::span<const iovec> runs) {
  const std::lock_guard lock(mutex_);
  if (state_.load(std::memory_order_acquire) == State::kClosed) return -1;
  return stream_->send_some(runs);
}

int64_t TlsLink::recv_some(std::span<const iovec> runs) {
  const std::lock_guard lock(mutex_);
  if (ahead_taken_ == ahead_.size()) return stream_->recv_some(runs);
  int64_t moved = 0;
  for (const iovec& run : runs) {
    const size_t count = std::min(run.iov_len, ahead_.size() - ahead_taken_);
    std::memcpy(run.iov_base, ahead_.data() + ahead_taken_, count);
    ahead_taken_ += count;
    moved += static_cast<int64_t>(count);
  }
  return moved;
}

std::string TlsLink::why() const {
  const std::lock_guard lock(mutex_);
  return stream_->why();
}

bool TlsLink::begin_frame() {
  State idle = State::kIdle;
  return state_.compare_exchange_strong(idle, State::kWriting, std::memory_order_acq_rel);
}

void TlsLink::end_frame() {
  State writing = State::kWriting;
  state_.compare_exchange_strong(writing, State::kIdle, std::memory_order_acq_rel);
}

short TlsLink::events(bool receiving, bool sending) const {
  return static_cast<short>(POLLRDHUP | (receiving ? POLLIN : 0) | (sending ? POLLOUT : 0));
}

Link::Peer TlsLink::look(Farewell* farewell) {
  pollfd entry{stream_->fd(), POLLRDHUP, 0};
  if (::poll(&entry, 1, 0) <= 0 || entry.revents == 0) return Peer::kAlive;
  const std::lock_guard lock(mutex_);
  ahead_.erase(ahead_.begin(), ahead_.begin() + static_cast<std::ptrdiff_t>(ahead_taken_));
  ahead_taken_ = 0;
  while (ahead_.size() < kMaxAhead) {
    const size_t before = ahead_.size();
    ahead_.resize(kMaxAhead);
    const iovec rest{ahead_.data() + before, kMaxAhead - before};
    const int64_t count = stream_->recv_some({&rest, 1});
    ahead_.resize(before + static_cast<size_t>(std::max<int64_t>(count, 0)));
    if (count <= 0) break;
  }
  if (ahead_.size() == kMaxAhead) return Peer::kUnread;
  if (ahead_.size() >= kFarewellBytes) {
    const auto tail = std::span<const std::byte>(ahead_).last(kFarewellBytes);
    if (auto found = decode_farewell(tail, generation_)) {
      *farewell = *found;
      return found->clean ? Peer::kLeft : Peer::kGone;
    }
  }
  *farewell = Farewell{};
  return Peer::kGone;
}

void TlsLink::farewell(const FarewellFrame& frame) noexcept {
  const State before = state_.exchange(State::kClosed, std::memory_order_acq_rel);
  if (before == State::kClosed) return;
  const std::lock_guard lock(mutex_);  // held for one bounded, non-blocking call at most
  // As in clear: never into the middle of a frame, or of a record that the socket did not take.
  if (before == State::kIdle && !stream_->unsent()) {
    const iovec whole{const_cast<std::byte*>(frame.data()), frame.size()};
    (void)stream_->send_some({&whole, 1});
  }
  ::shutdown(stream_->fd(), SHUT_RDWR);
}

}  // namespace phalanx::comm
