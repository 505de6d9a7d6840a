#pragma once

#include <memory>
#include <string>
#include <vector>

#include "phalanx/base/clock.h"
#include "phalanx/comm/bootstrap.h"
#include "phalanx/comm/fault.h"
#include "phalanx/comm/link.h"
#include "phalanx/comm/topology.h"

namespace phalanx::comm {

// Links over UCX (Unified Communication X), for RDMA fabrics. The library is loaded when it is asked
// for, so that a process without such links has none of it, its signal handlers included.

// Replaces every link of `channels` (by rank, null for own node), which have proved themselves, by
// one whose bytes travel over UCX: addresses of UCX workers are exchanged over the old link, which
// stays as what tells that a peer is gone, why, and that its network is cut. What links say and do is
// the same otherwise. Throws FaultError; `watch` is asked every 50 ms.
[[nodiscard]] std::vector<std::unique_ptr<Link>> links_over_ucx(
    const GroupOptions& options, const Topology& topology,
    std::vector<std::unique_ptr<Link>> channels, Deadline deadline, Watch* watch);

// The network devices by UCX's names that carry `address`: its interface, and the RDMA ports of the
// same card, from `sysfs`/class/net. Empty if no interface of this machine has the address.
[[nodiscard]] std::string ucx_devices(const std::string& address,
                                      const std::string& sysfs = "/sys");

}  // namespace phalanx::comm
