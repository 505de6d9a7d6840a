#pragma once

#include <string>

#include "apps/doctor_report.h"

namespace phalanx::apps {

// Decode speed of one sequence on the first 1, 2, ... ranks of the table, from what was measured:
//   the slowest rank's share of (bytes of a token / read bandwidth), or of the operations / peak
//   + gathers of all layers * (half a round trip + bytes / bandwidth of the worst link in use)
//   + a constant per layer and per token for what is too small to be either (doctor_predict.cc).
// The cut is the one that a start would make. Adds a problem for a node without the memory for its
// share of the weights. `context`: positions in the cache. Throws Error for a bad model.
void predict(DoctorReport& report, const std::string& model, double context);

}  // namespace phalanx::apps
