#pragma once

#include <sys/types.h>

#include <string>

#include "phalanx/base/error.h"

namespace phalanx::net {

// A certificate, key, authority, revocation list, password file or key store, admitted by the rules
// of startup-security.md §2.2: at most `max_mode`, own, no link, 1 byte to 10 MiB, never switched
// off. Empty with a problem added if it is refused. Keys among them are to be wiped by the caller.
[[nodiscard]] std::string read_security_file(const std::string& path, Problems& problems,
                                             Problems& warnings, mode_t max_mode = 0640);

}  // namespace phalanx::net
