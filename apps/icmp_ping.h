#pragma once

#include <chrono>
#include <optional>
#include <string>

namespace phalanx::apps {

// One host asked for an echo, packet by packet. Needs no rights: an ICMP datagram socket where the
// system lets this user's group have one, else a raw one, else UDP to a port where nobody listens
// (the host answers that it is closed, which is an answer too).
class Pinger {
 public:
  struct Reply {
    enum class Kind { kAnswered, kTimeout, kTooLong, kUnreachable };
    Kind kind = Kind::kTimeout;
    std::chrono::nanoseconds time{};  // until the answer
  };

  // Both numeric; source may be empty or an address that is not of this machine: then the system
  // chooses. Throws Error(kUnavailable) if no socket can be had.
  Pinger(const std::string& target, const std::string& source);
  ~Pinger();
  Pinger(const Pinger&) = delete;
  Pinger& operator=(const Pinger&) = delete;

  // Sends `bytes` of payload, 0 ... 65,507, and waits for its answer.
  [[nodiscard]] Reply ask(uint16_t sequence, size_t bytes, std::chrono::milliseconds deadline);
  // The third way is used; what it means is for the reader of the result.
  [[nodiscard]] bool by_udp() const { return way_ == Way::kUdp; }

 private:
  enum class Way { kDatagram, kRaw, kUdp };
  [[nodiscard]] bool is_answer(const unsigned char* packet, size_t bytes, uint16_t sequence) const;

  int fd_ = -1;
  Way way_ = Way::kDatagram;
  bool v6_ = false;
  uint16_t id_ = 0;
};

}  // namespace phalanx::apps
