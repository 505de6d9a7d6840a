#pragma once

namespace phalanx::apps {

// `phalanx bench <what>`: each prints a floor or a peak beside its result, and the ratio.
int bench_main(int argc, char** argv);

}  // namespace phalanx::apps
