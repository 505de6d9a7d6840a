#include <arpa/inet.h>
#include <fmt/format.h>
#include <ifaddrs.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <string_view>

#include "phalanx/base/error.h"
#include "phalanx/comm/bootstrap.h"
#include "phalanx/comm/tcp/address.h"

namespace phalanx::comm {

namespace {

std::string own_addresses() {
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) return "unknown";
  std::string text;
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr) continue;
    const int family = entry->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) continue;
    char host[INET6_ADDRSTRLEN + 32] = {};
    const socklen_t size = family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    if (::getnameinfo(entry->ifa_addr, size, host, sizeof host, nullptr, 0, NI_NUMERICHOST) != 0)
      continue;
    text += fmt::format("{}{} ({})", text.empty() ? "" : ", ", host, entry->ifa_name);
  }
  ::freeifaddrs(list);
  return text.empty() ? "none" : text;
}

}  // namespace

SocketAddress parse_address(const std::string& address, uint16_t port) {
  SocketAddress out;
  addrinfo hints{};
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (::getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found) != 0 ||
      found == nullptr)
    throw Error(Code::kInvalidArgument,
                fmt::format("data address: found \"{}\", expected a numeric IPv4 or IPv6 address",
                            address));
  std::memcpy(&out.storage, found->ai_addr, found->ai_addrlen);
  out.size = found->ai_addrlen;
  ::freeaddrinfo(found);
  return out;
}

bool is_own_address(const std::string& address) {
  if (address.empty()) return false;
  SocketAddress own = parse_address(address, 0);
  const UniqueFd fd(::socket(own.storage.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  return fd.valid() && ::bind(fd.get(), own.get(), own.size) == 0;
}

void tune_data_socket(int fd) {
  const int on = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  // A rank that only waits has nothing unacknowledged by which a cut network would show.
  ::setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  const int second = 1;
  const int probes = 2;
  ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &second, sizeof second);
  ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &second, sizeof second);
  ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
  char name[16] = {};
  socklen_t size = sizeof name;
  if (::getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &size) != 0 ||
      std::string_view(name, 3) != "bbr")
    return;
  const std::string_view steady = "reno";  // in every kernel, and open to every user
  ::setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, steady.data(),
               static_cast<socklen_t>(steady.size()));
}

UniqueFd listen_on(const std::string& address, uint16_t port_begin, uint16_t port_end,
                   uint16_t* port) {
  const int first = port_end > 0 ? port_begin : 0;
  const int last = port_end > 0 ? port_end : 0;
  if (first > last || (port_end > 0 && first == 0))
    throw Error(Code::kInvalidArgument,
                fmt::format("data ports: found {}-{}, expected an ascending range of ports from 1 "
                            "to 65535",
                            port_begin, port_end));
  int failure = 0;
  for (int candidate = first; candidate <= last; ++candidate) {
    SocketAddress target = parse_address(address, static_cast<uint16_t>(candidate));
    UniqueFd fd(::socket(target.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    const int on = 1;
    // Here already: what it accepts begins as the listener is, and BBR leaves its pacing behind.
    if (fd.valid()) tune_data_socket(fd.get());
    if (!fd.valid() ||
        // Lets a new generation take a port whose old connections are still in TIME_WAIT.
        ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) != 0 ||
        ::bind(fd.get(), target.get(), target.size) != 0 ||
        ::listen(fd.get(), SOMAXCONN) != 0 ||
        ::getsockname(fd.get(), target.get(), &target.size) != 0) {
      failure = errno;
      continue;
    }
    *port = ntohs(target.storage.ss_family == AF_INET
                      ? reinterpret_cast<const sockaddr_in&>(target.storage).sin_port
                      : reinterpret_cast<const sockaddr_in6&>(target.storage).sin6_port);
    return fd;
  }
  throw Error(
      Code::kUnavailable,
      fmt::format("cannot listen on data address {} {}: {} (errno {}); this machine has {}. Fix: "
                  "use an address of this machine and free ports",
                  address,
                  port_end > 0 ? fmt::format("ports {}-{}", first, last) : "port chosen by the system",
                  std::strerror(failure), failure, own_addresses()));
}

}  // namespace phalanx::comm
