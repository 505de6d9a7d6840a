#pragma once

namespace phalanx::apps {

// Writes a LLaMA checkpoint of a given shape with random weights, for benches: the speed of a model
// does not depend on what it has learnt. The same options give the same bytes on every machine.
// Returns the exit status; messages go to stderr.
int make_random_model(int argc, char** argv);

}  // namespace phalanx::apps
