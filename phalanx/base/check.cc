#include "phalanx/base/check.h"

#include <cstdio>
#include <cstdlib>

namespace phalanx::detail {

void check_failed(const char* condition, const char* file, int line) {
  std::fprintf(stderr, "%s:%d: internal check failed: %s\n", file, line, condition);
  std::abort();
}

}  // namespace phalanx::detail
