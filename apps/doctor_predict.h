#pragma once

#include <functional>
#include <string>
#include <vector>

#include "apps/doctor_rehearsal.h"
#include "apps/doctor_report.h"

namespace phalanx::apps {

// Runs one rehearsal on the first ranks of the table: works and results by rank. Throws Error.
using Rehearse = std::function<std::vector<RehearsalResult>(const std::vector<RehearsalWork>& works)>;

// Decode speed of one sequence on the first 1, 2, ... ranks of the table: that of a rehearsed step with
// the bytes, the cut and the gathers of this model. Adds a problem for a node without the memory for
// its share of the weights. `context`: positions in the cache. Throws Error for a bad model.
void predict(DoctorReport& report, const std::string& model, double context,
             const Rehearse& rehearse);

}  // namespace phalanx::apps
