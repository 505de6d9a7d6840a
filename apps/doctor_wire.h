#pragma once

// How doctors speak: u32 length (big endian), then a JSON object, over TCP between addresses of the
// rank table; raw bytes while an echo or a transfer runs. Every call has a deadline.

#include <sys/socket.h>

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "phalanx/base/clock.h"
#include "phalanx/base/unique_fd.h"

namespace phalanx::apps {

inline constexpr int kDoctorVersion = 2;
inline constexpr uint16_t kDoctorPort = 1119;
inline constexpr uint32_t kDoctorFrameBytes = 256 << 10;
inline constexpr int kDoctorMostPorts = 1024;  // of a node, looked at

// A numeric address and port for the socket calls. Throws Error(kInvalidArgument).
struct DoctorAddress {
  DoctorAddress(const std::string& address, uint16_t port);
  sockaddr_storage storage{};
  socklen_t size = 0;
  [[nodiscard]] const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};
// Of a socket's peer or a datagram's sender, canonical.
[[nodiscard]] std::string address_text(const sockaddr_storage& storage);

// A listening TCP socket (non-blocking) or a UDP socket on that address; throws Error(kUnavailable)
// with errno's words.
[[nodiscard]] UniqueFd bind_doctor_socket(const std::string& address, uint16_t port, int type);

// The end of a try to connect: error 0 is open, ETIMEDOUT no answer by the deadline.
struct Dialled {
  UniqueFd fd;
  int error = 0;
};
// Connects to all ports at once, from the address `own`; one answer per port, in order.
[[nodiscard]] std::vector<Dialled> dial(const std::string& own, const std::string& peer,
                                        const std::vector<int>& ports, Deadline deadline);
// "open", "closed", "blocked" or "unreachable".
[[nodiscard]] std::string dial_state(int error);

class DoctorStream {
 public:
  // `who` names the peer in errors.
  DoctorStream(UniqueFd fd, std::string who);

  // Throw Error(kDeadlineExceeded), Error(kUnavailable) when the peer is gone.
  void send(const nlohmann::json& message, Deadline deadline);
  // Nothing at an end between messages. Throws Error(kInvalidArgument) for what is no such message.
  [[nodiscard]] std::optional<nlohmann::json> receive(Deadline deadline);
  // send, then receive; an end is an error too, and so is {"error": text}.
  [[nodiscard]] nlohmann::json ask(const nlohmann::json& message, Deadline deadline);
  void write_all(std::span<const char> bytes, Deadline deadline);
  // Fills `bytes`; false at an end before the first of them. Spins a short while before it sleeps, as
  // the data plane does.
  [[nodiscard]] bool read_all(std::span<char> bytes, Deadline deadline);
  // Some bytes; 0 at the end.
  [[nodiscard]] size_t read_some(std::span<char> bytes, Deadline deadline);

  [[nodiscard]] int fd() const { return fd_.get(); }
  [[nodiscard]] UniqueFd take() { return std::move(fd_); }

 private:
  void wait(short events, Deadline deadline, const char* what);

  UniqueFd fd_;
  std::string who_;
};

[[nodiscard]] int64_t wall_clock_ns();

}  // namespace phalanx::apps
