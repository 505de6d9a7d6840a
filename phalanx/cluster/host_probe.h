#pragma once

#include <string>

namespace phalanx::cluster {

// Whether the machine at a numeric address answers at all within 0.3 s: a refused connection is an
// answer. Tells a standstill of one process from a cut network.
[[nodiscard]] bool host_answers(const std::string& address);

}  // namespace phalanx::cluster
