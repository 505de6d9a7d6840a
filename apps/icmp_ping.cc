#include "apps/icmp_ping.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/icmp6.h>
#include <netinet/in.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/net/address.h"

namespace phalanx::apps {
namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kHeader = 8;
// traceroute's first port: nobody listens there.
constexpr uint16_t kClosedPort = 33434;

socklen_t to_sockaddr(const std::string& text, bool v6, uint16_t port, sockaddr_storage& out) {
  std::memset(&out, 0, sizeof out);
  if (v6) {
    auto& a = reinterpret_cast<sockaddr_in6&>(out);
    a.sin6_family = AF_INET6;
    a.sin6_port = htons(port);
    ::inet_pton(AF_INET6, text.c_str(), &a.sin6_addr);
    return sizeof a;
  }
  auto& a = reinterpret_cast<sockaddr_in&>(out);
  a.sin_family = AF_INET;
  a.sin_port = htons(port);
  ::inet_pton(AF_INET, text.c_str(), &a.sin_addr);
  return sizeof a;
}

// RFC 1071.
uint16_t checksum(const std::vector<unsigned char>& bytes) {
  uint32_t sum = 0;
  for (size_t i = 0; i < bytes.size(); i += 2)
    sum += static_cast<uint32_t>(bytes[i] << 8 | (i + 1 < bytes.size() ? bytes[i + 1] : 0));
  while (sum >> 16 != 0) sum = (sum & 0xffff) + (sum >> 16);
  return static_cast<uint16_t>(~sum);
}

bool is_unreachable(int error) {
  return error == EHOSTUNREACH || error == ENETUNREACH || error == EHOSTDOWN || error == ENETDOWN;
}

}  // namespace

Pinger::Pinger(const std::string& target, const std::string& source)
    : v6_(target.find(':') != std::string::npos), id_(static_cast<uint16_t>(::getpid())) {
  const int family = v6_ ? AF_INET6 : AF_INET;
  const int icmp = v6_ ? static_cast<int>(IPPROTO_ICMPV6) : static_cast<int>(IPPROTO_ICMP);
  constexpr int kFlags = SOCK_CLOEXEC | SOCK_NONBLOCK;
  fd_ = ::socket(family, SOCK_DGRAM | kFlags, icmp);
  if (fd_ < 0) {
    way_ = Way::kRaw;
    fd_ = ::socket(family, SOCK_RAW | kFlags, icmp);
  }
  if (fd_ < 0) {
    way_ = Way::kUdp;
    fd_ = ::socket(family, SOCK_DGRAM | kFlags, 0);
  }
  if (fd_ < 0)
    throw Error(Code::kUnavailable, fmt::format("no socket to ping with: {}", std::strerror(errno)));
  sockaddr_storage address{};
  if (!source.empty() && (source.find(':') != std::string::npos) == v6_ && net::is_local(source)) {
    const socklen_t size = to_sockaddr(source, v6_, 0, address);
    (void)::bind(fd_, reinterpret_cast<sockaddr*>(&address), size);
  }
  // Connected, a socket hears only of its target, and of errors on the way there.
  const socklen_t size = to_sockaddr(target, v6_, way_ == Way::kUdp ? kClosedPort : 0, address);
  (void)::connect(fd_, reinterpret_cast<sockaddr*>(&address), size);
}

Pinger::~Pinger() { ::close(fd_); }

bool Pinger::is_answer(const unsigned char* packet, size_t bytes, uint16_t sequence) const {
  if (way_ == Way::kUdp) return true;
  if (way_ == Way::kRaw && !v6_) {  // with its IP header
    if (bytes < 20) return false;
    const size_t header = static_cast<size_t>(packet[0] & 15U) * 4;
    if (bytes < header) return false;
    packet += header;
    bytes -= header;
  }
  const unsigned char reply = v6_ ? ICMP6_ECHO_REPLY : ICMP_ECHOREPLY;
  if (bytes < kHeader || packet[0] != reply) return false;
  // The kernel puts an id of its own into what a datagram socket sends.
  if (way_ == Way::kRaw && (packet[4] << 8 | packet[5]) != id_) return false;
  return (packet[6] << 8 | packet[7]) == sequence;
}

Pinger::Reply Pinger::ask(uint16_t sequence, size_t bytes, std::chrono::milliseconds deadline) {
  std::vector<unsigned char> packet((way_ == Way::kUdp ? 0 : kHeader) + bytes);
  if (way_ != Way::kUdp) {
    packet[0] = v6_ ? ICMP6_ECHO_REQUEST : ICMP_ECHO;
    packet[4] = static_cast<unsigned char>(id_ >> 8);
    packet[5] = static_cast<unsigned char>(id_);
    packet[6] = static_cast<unsigned char>(sequence >> 8);
    packet[7] = static_cast<unsigned char>(sequence);
    const uint16_t sum = checksum(packet);  // for IPv6 the kernel makes its own
    packet[2] = static_cast<unsigned char>(sum >> 8);
    packet[3] = static_cast<unsigned char>(sum);
  }
  const auto failed = [](int error) -> Reply {
    if (error == EMSGSIZE) return {.kind = Reply::Kind::kTooLong};
    return {.kind = is_unreachable(error) ? Reply::Kind::kUnreachable : Reply::Kind::kTimeout};
  };
  const auto start = Clock::now();
  if (::send(fd_, packet.data(), packet.size(), 0) < 0 && errno != ECONNREFUSED)
    return failed(errno);
  std::array<unsigned char, 65536> in{};
  for (;;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - (Clock::now() - start));
    pollfd entry{fd_, POLLIN, 0};
    if (left.count() <= 0 || ::poll(&entry, 1, static_cast<int>(left.count())) <= 0)
      return {.kind = Reply::Kind::kTimeout};
    const ssize_t got = ::recv(fd_, in.data(), in.size(), 0);
    const int error = errno;
    const auto time = Clock::now() - start;
    if (got < 0 && error == ECONNREFUSED && way_ == Way::kUdp)
      return {.kind = Reply::Kind::kAnswered, .time = time};
    if (got < 0 && (error == EMSGSIZE || is_unreachable(error))) return failed(error);
    if (got >= 0 && is_answer(in.data(), static_cast<size_t>(got), sequence))
      return {.kind = Reply::Kind::kAnswered, .time = time};
  }
}

}  // namespace phalanx::apps
