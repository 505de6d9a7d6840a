#include "phalanx/net/security_file.h"

#include "phalanx/base/guarded_file.h"

namespace phalanx::net {

std::string read_security_file(const std::string& path, Problems& problems, Problems& warnings,
                               mode_t max_mode) {
  const size_t before = problems.list().size();
  std::string text = read_guarded_file(
      path, {.max_mode = max_mode, .owner_x_warns = true, .check_switch_applies = false}, problems,
      warnings);
  if (problems.list().size() != before) text.clear();
  return text;
}

}  // namespace phalanx::net
