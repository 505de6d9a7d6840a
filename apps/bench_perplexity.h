#pragma once

namespace phalanx::apps {

// `phalanx bench perplexity`: of a text under a checkpoint, on one rank.
int bench_perplexity(int argc, char** argv);

}  // namespace phalanx::apps
