#pragma once

#include <vector>

#include "apps/doctor_node.h"
#include "apps/doctor_report.h"
#include "apps/doctor_wire.h"

namespace phalanx::apps {

// Measures the way from this node to server `to` of the table: its ports, TLS, round trip, clock,
// whole packets, loss and bandwidth. Takes about a second, and at most 20 where nothing answers.
// Opens connections to that server's address only. What fails ends up in the report.
[[nodiscard]] LinkReport probe_link(const DoctorOptions& options, int to,
                                    const std::vector<DoctorPort>& ports);

// A connection to the doctor of server `to`. Throws Error(kUnavailable) with the reason.
[[nodiscard]] DoctorStream dial_doctor(const DoctorOptions& options, int to, Deadline deadline);

// What a datagram of the doctor begins with; the answer to one is its first kDatagramAnswer bytes.
struct DoctorDatagram {
  uint32_t magic = kMagic;
  uint32_t number = 0;
  uint64_t token = 0;  // of the one who asks
  static constexpr uint32_t kMagic = 0x50444331;  // "PDC1"
};

inline constexpr int kEchoMost = 2000;
inline constexpr int kEchoBytes = 64;
inline constexpr int64_t kTransferMost = int64_t{2} << 30;

}  // namespace phalanx::apps
