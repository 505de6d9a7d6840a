#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>

namespace phalanx::comm {

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t size = 0;

  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
};

// A numeric IPv4 or IPv6 address. Throws Error(kInvalidArgument).
[[nodiscard]] SocketAddress parse_address(const std::string& address, uint16_t port);

// Whether this machine (in this network namespace) has the address. False for anything else.
[[nodiscard]] bool is_own_address(const std::string& address);

}  // namespace phalanx::comm
