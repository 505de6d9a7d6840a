#pragma once

namespace phalanx::apps {

// Open-loop load against an OpenAI-compatible endpoint: requests are sent at their times, whether or
// not earlier ones have been answered.
int bench_serve(int argc, char** argv);

}  // namespace phalanx::apps
