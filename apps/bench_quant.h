#pragma once

namespace phalanx::apps {

// `phalanx bench quant`: linear layers of quantised weights beside bandwidth and peak.
int bench_quant(int argc, char** argv);

}  // namespace phalanx::apps
