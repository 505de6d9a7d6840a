#pragma once

#include <string>

#include "phalanx/base/error.h"

namespace phalanx::apps {

// The directory table of startup-security.md §2.1 for what exists under `home`: `security` and
// everything in it and `conf` are problems, the rest warnings. An owner's x bit on security files,
// which `chmod -R 700` leaves, only warns. Anything somebody else could replace is a problem.
void check_installation(const std::string& home, Problems& problems, Problems& warnings);

}  // namespace phalanx::apps
