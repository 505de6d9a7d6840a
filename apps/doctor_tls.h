#pragma once

#include <memory>
#include <string>

#include "apps/doctor_node.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/net/tls_context.h"

namespace phalanx::apps {

// Handshakes with the doctor of server `to` as nodes do: both certificates are judged, and each must
// be of the node at its address. "good", or why not, from both sides' view.
[[nodiscard]] std::string try_tls(const DoctorOptions& options, int to);

// The listener's side: a handshake on this connection from server `from`, whose first byte begins
// one. "good", or the reason.
[[nodiscard]] std::string answer_tls(const DoctorOptions& options, int from, UniqueFd connection);

}  // namespace phalanx::apps
