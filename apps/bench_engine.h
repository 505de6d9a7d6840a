#pragma once

namespace phalanx::apps {

// Prefill and decode speed of a checkpoint on local ranks, through the whole engine, beside the
// roofline that the machine's read bandwidth gives.
int bench_engine(int argc, char** argv);

}  // namespace phalanx::apps
