#pragma once

#include <string>

namespace phalanx::comm {

// Whether the network beneath a TCP connection is cut: what was sent has been sent again, or the
// closed window asked after, at least twice, and no packet of the peer came for two seconds. The
// peer's kernel acknowledges while its process computes, waits or stands still, so that neither
// looks like this. Empty: no sign of it. Any thread.
[[nodiscard]] std::string silence_of(int fd);

}  // namespace phalanx::comm
