#include "phalanx/comm/tcp/silence.h"

#include <fmt/format.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

namespace phalanx::comm {

namespace {
constexpr uint32_t kSilentMs = 2000;
constexpr int kRepeats = 2;
}  // namespace

std::string silence_of(int fd) {
  tcp_info info{};
  socklen_t size = sizeof info;
  if (::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0) return {};
  const bool repeated = info.tcpi_retransmits >= kRepeats || info.tcpi_probes >= kRepeats;
  if (!repeated || info.tcpi_last_ack_recv < kSilentMs) return {};
  return fmt::format("no packet of it for {:.1f} s: the network of the data plane is cut",
                     info.tcpi_last_ack_recv / 1000.0);
}

}  // namespace phalanx::comm
