#pragma once

#include <string>
#include <vector>

namespace phalanx::apps {

// A table of every certificate and revocation list in these files and folders: who, until when,
// which file, verdict. Returns whether all are good.
[[nodiscard]] bool show_certificates(const std::vector<std::string>& paths);

}  // namespace phalanx::apps
