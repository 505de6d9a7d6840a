#pragma once

#include <memory>
#include <vector>

#include "phalanx/base/clock.h"
#include "phalanx/comm/bootstrap.h"
#include "phalanx/comm/fault.h"
#include "phalanx/comm/link.h"
#include "phalanx/comm/topology.h"

namespace phalanx::comm {

// One authenticated link to every rank of other nodes, by rank (null for own node). The higher rank
// connects, the lower accepts on `listener`. Strangers at the listener get a bounded number of
// places and 2 s each, and change nothing. Throws FaultError naming the ranks that are missing,
// each with the reason, by the deadline; at once if a peer refuses this rank or is lost.
// `watch` is asked every 50 ms.
[[nodiscard]] std::vector<std::unique_ptr<Link>> connect_links(const GroupOptions& options,
                                                               const Topology& topology,
                                                               int listener, Deadline deadline,
                                                               Watch* watch);

}  // namespace phalanx::comm
