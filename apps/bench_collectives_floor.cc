#include "apps/bench_collectives_floor.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "phalanx/base/clock.h"
#include "phalanx/base/error.h"
#include "phalanx/comm/sum.h"
#include "phalanx/comm/tcp/address.h"

using phalanx::Code;
using phalanx::Error;
using phalanx::now_ns;
using phalanx::UniqueFd;
using phalanx::comm::parse_address;
using phalanx::comm::SocketAddress;
using phalanx::comm::sum_in_order;

namespace {
constexpr int64_t kSpinNs = 50'000;

[[noreturn]] void fail(const char* what) {
  throw Error(Code::kUnavailable, std::string("raw floor: ") + what + ": " + std::strerror(errno));
}
}  // namespace

size_t ShmFloor::bytes_for(int size, int64_t max_bytes) {
  return size * sizeof(Flag) + 4096 + static_cast<size_t>(2 * size * max_bytes);
}

ShmFloor::ShmFloor(void* memory, int rank, int size, int64_t max_bytes)
    : flags_(static_cast<Flag*>(memory)),
      rank_(rank),
      size_(size),
      max_bytes_(max_bytes),
      sources_(size) {
  const size_t flags = (size * sizeof(Flag) + 4095) / 4096 * 4096;
  slots_ = static_cast<std::byte*>(memory) + flags;
}

void ShmFloor::publish(const std::byte* data, int64_t bytes) {
  std::memcpy(slot(rank_), data, bytes);
  flags_[rank_].rounds.store(round_ + 1, std::memory_order_release);
}

void ShmFloor::await(int rank) {
  for (int i = 0; flags_[rank].rounds.load(std::memory_order_acquire) < round_ + 1; ++i) {
    if (i < 2000) {
      __builtin_ia32_pause();
    } else {
      ::sched_yield();
    }
  }
}

void ShmFloor::all_gather(std::span<std::byte* const> blocks, int64_t bytes) {
  publish(blocks[rank_], bytes);
  for (int step = 1; step < size_; ++step) {
    const int peer = (rank_ + step) % size_;
    await(peer);
    std::memcpy(blocks[peer], slot(peer), bytes);
  }
  ++round_;
}

void ShmFloor::all_reduce(std::span<float> values) {
  publish(reinterpret_cast<const std::byte*>(values.data()),
          static_cast<int64_t>(values.size_bytes()));
  for (int peer = 0; peer < size_; ++peer) {
    if (peer != rank_) await(peer);
    sources_[peer] = peer == rank_ ? values.data() : reinterpret_cast<const float*>(slot(peer));
  }
  sum_in_order(values.data(), sources_, static_cast<int64_t>(values.size()));
  ++round_;
}

TcpFloor::TcpFloor(int listener, const std::vector<std::string>& addresses,
                   const std::vector<uint16_t>& ports, int rank)
    : peers_(ports.size()),
      rank_(rank),
      sent_(ports.size()),
      received_(ports.size()),
      blocks_(ports.size()),
      sources_(ports.size()) {
  for (int peer = 0; peer < rank; ++peer) {
    SocketAddress target = parse_address(addresses[peer], ports[peer]);
    UniqueFd fd(::socket(target.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    phalanx::comm::tune_data_socket(fd.get());
    if (::connect(fd.get(), target.get(), target.size) != 0) fail("connect");
    if (::send(fd.get(), &rank, sizeof rank, MSG_NOSIGNAL) != sizeof rank) fail("send");
    peers_[peer] = std::move(fd);
  }
  for (size_t more = ports.size() - rank - 1; more > 0;) {
    pollfd entry{listener, POLLIN, 0};
    if (::poll(&entry, 1, 10'000) <= 0) fail("no peer connected within 10 s");
    UniqueFd fd(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
    if (!fd.valid()) continue;
    int peer = -1;
    if (::recv(fd.get(), &peer, sizeof peer, MSG_WAITALL) != sizeof peer || peer <= rank ||
        peer >= static_cast<int>(ports.size()))
      fail("bad peer");
    peers_[peer] = std::move(fd);
    --more;
  }
  for (const UniqueFd& fd : peers_) {
    if (!fd.valid()) continue;
    phalanx::comm::tune_data_socket(fd.get());
    ::fcntl(fd.get(), F_SETFL, ::fcntl(fd.get(), F_GETFL) | O_NONBLOCK);
  }
}

void TcpFloor::all_gather(std::span<std::byte* const> blocks, int64_t bytes) {
  const int size = static_cast<int>(peers_.size());
  std::fill(sent_.begin(), sent_.end(), 0);
  std::fill(received_.begin(), received_.end(), 0);
  int64_t idle_until = now_ns() + kSpinNs;
  for (;;) {
    bool moved = false, done = true;
    for (int peer = 0; peer < size; ++peer) {
      if (peer == rank_) continue;
      if (sent_[peer] < bytes) {
        const ssize_t count = ::send(peers_[peer].get(), blocks[rank_] + sent_[peer],
                                     bytes - sent_[peer], MSG_NOSIGNAL);
        if (count < 0 && errno != EAGAIN) fail("send");
        if (count > 0) sent_[peer] += count, moved = true;
      }
      if (received_[peer] < bytes) {
        const ssize_t count =
            ::recv(peers_[peer].get(), blocks[peer] + received_[peer], bytes - received_[peer], 0);
        if (count == 0 || (count < 0 && errno != EAGAIN)) fail("recv");
        if (count > 0) received_[peer] += count, moved = true;
      }
      done = done && sent_[peer] == bytes && received_[peer] == bytes;
    }
    if (done) return;
    if (moved) {
      idle_until = now_ns() + kSpinNs;
    } else if (now_ns() > idle_until) {
      std::vector<pollfd> entries;
      for (int peer = 0; peer < size; ++peer)
        if (peer != rank_)
          entries.push_back({peers_[peer].get(),
                             static_cast<short>((sent_[peer] < bytes ? POLLOUT : 0) |
                                                (received_[peer] < bytes ? POLLIN : 0)),
                             0});
      if (::poll(entries.data(), entries.size(), 10'000) <= 0) fail("no peer answered within 10 s");
    }
  }
}

void TcpFloor::all_reduce(std::span<float> values) {
  const auto bytes = static_cast<int64_t>(values.size_bytes());
  if (scratch_.size() < static_cast<size_t>(bytes) * peers_.size())
    scratch_.resize(bytes * peers_.size());
  for (size_t peer = 0; peer < peers_.size(); ++peer) {
    blocks_[peer] = static_cast<int>(peer) == rank_ ? reinterpret_cast<std::byte*>(values.data())
                                                    : scratch_.data() + peer * bytes;
    sources_[peer] = reinterpret_cast<const float*>(blocks_[peer]);
  }
  all_gather(blocks_, bytes);
  sum_in_order(values.data(), sources_, static_cast<int64_t>(values.size()));
}
