#pragma once

namespace phalanx::apps {

// `phalanx run`: offline inference with the options of run_pa. Without RANK in the environment one
// command starts all local ranks; with RANK, WORLD_SIZE and RANK_TABLE_FILE it is one rank of many.
int run_main(int argc, char** argv);

}  // namespace phalanx::apps
