#pragma once

namespace phalanx::apps {

// `llm_engine_test`, `phalanx self-test`: starts the configured instance without HTTP, answers one
// prompt, prints it and stops. On several nodes: the same command on each.
int one_prompt_main(int argc, char** argv);

}  // namespace phalanx::apps
