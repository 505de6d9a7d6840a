#include "phalanx/base/error.h"
#include "phalanx/comm/ucx/ucx.h"

namespace phalanx::comm {

std::string ucx_problem() {
  return "this build has no links over UCX: its headers were not found when it was configured "
         "(scripts/setup installs libucx-dev), or it was configured with -DPHALANX_UCX=OFF or for "
         "the thread sanitizer";
}

std::vector<std::unique_ptr<Link>> links_over_ucx(const GroupOptions&, const Topology&,
                                                  std::vector<std::unique_ptr<Link>>, Deadline,
                                                  Watch*) {
  throw Error(Code::kUnimplemented, ucx_problem());
}

}  // namespace phalanx::comm
