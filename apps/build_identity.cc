#include "apps/build_identity.h"

#include "phalanx/comm/frame.h"
#include "phalanx/engine/step_plan.h"
#include "phalanx/ops/isa.h"

namespace phalanx::apps {
namespace {

constexpr BuildIdentity kIdentity{.mark = {'@', '(', '#', ')', 'p', 'h', 'a', 'l', 'a', 'n', 'x', '-',
                                           '0', '0', '0', '1'},
                                  .release = PHALANX_VERSION,
                                  .wire_version = engine::kStepPlanVersion,
                                  .frame_version = comm::kWireVersion,
                                  .numerics_version = ops::kNumericsVersion};

}  // namespace

const BuildIdentity& build_identity() { return kIdentity; }

}  // namespace phalanx::apps
