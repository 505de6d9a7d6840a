#pragma once

namespace phalanx::apps {

// `phalanx doctor`: every pair of nodes measured before anything is started, by listeners of the same
// program (--listen). Exit status 0, or 1 if there is a problem.
int doctor_main(int argc, char** argv);

}  // namespace phalanx::apps
