#pragma once

#include <string>

#include "apps/config.h"
#include "phalanx/base/log.h"

namespace phalanx::apps {

// The MINDIE_LOG_* variables (and their removed older names) as log options of a node process.
// Lines go to stderr unless MINDIE_LOG_TO_STDOUT is 0; to a file below MINDIE_LOG_PATH only if
// MINDIE_LOG_TO_FILE is 1 or true; the file's directory is made (0750). A bad value gives a
// warning and the default: logging never stops a start.
[[nodiscard]] LogOptions node_log_options(const Environment& environment,
                                          std::vector<std::string>& warnings);

}  // namespace phalanx::apps
