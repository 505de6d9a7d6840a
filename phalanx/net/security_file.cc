#include "phalanx/net/security_file.h"

#include "phalanx/base/guarded_file.h"

namespace phalanx::net {

std::string read_security_file(const std::string& path, Problems& problems, Problems& warnings) {
  const size_t before = problems.list().size();
  std::string text = read_guarded_file(path, {.owner_x_warns = true, .check_switch_applies = false}, problems, warnings);
  if (problems.list().size() != before) text.clear();
  return text;
}

}  // namespace phalanx::net
