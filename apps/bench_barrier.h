#pragma once

namespace phalanx::apps {

int bench_barrier(int argc, char** argv);  // a parallel region with nothing in it

}  // namespace phalanx::apps
