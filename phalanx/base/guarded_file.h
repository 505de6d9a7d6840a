#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "phalanx/base/error.h"

namespace phalanx {

// Admission rules of a file (startup-security.md §2.2).
struct FileRule {
  mode_t max_mode = 0640;              // a bit subset test per rwx triple
  bool owner_must_match = true;        // st_uid equals the process's real uid
  bool root_exempt = false;            // uid 0 passes owner and mode
  bool owner_x_warns = false;          // an owner's x bit (chmod -R 700 leaves it) only warns
  bool symlink_allowed = false;        // of the last component
  int64_t min_bytes = 1;
  int64_t max_bytes = 10 << 20;
  bool check_switch_applies = true;    // MINDIE_CHECK_INPUTFILES_PERMISSION=0: owner and mode only warn
};

// Opens first (O_NOFOLLOW), then checks the descriptor, then reads: nothing can be swapped in
// between. Every finding goes to `problems` with path, rule, found and the command that mends it;
// findings that the check switch turns into warnings go to `warnings`. Returns the text, empty when
// it could not be read.
[[nodiscard]] std::string read_guarded_file(const std::string& path, const FileRule& rule,
                                            Problems& problems, Problems& warnings);

// The same without reading: true if the file is there and can be opened.
bool check_guarded_file(const std::string& path, const FileRule& rule, Problems& problems,
                        Problems& warnings);

}  // namespace phalanx
