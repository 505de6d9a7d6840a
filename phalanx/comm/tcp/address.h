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

// For small messages at once and large ones at a steady pace: no Nagle, and no congestion control
// that paces by an estimate of its own (BBR): over links of a few microseconds that estimate settles
// anywhere between the full speed and two thirds of it, for as long as the connection lives. Reno
// instead; other choices of the system stay. Before connect() or listen(): what BBR has begun to
// pace stays paced.
void tune_data_socket(int fd);

}  // namespace phalanx::comm
