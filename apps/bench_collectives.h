#pragma once

// `phalanx bench collectives`: all_gather and all_reduce beside the raw floor of the same run, then
// this project's cut beside row-parallel layers. Returns the exit status. Forks its ranks, so it
// must be called while the process has one thread.
int bench_collectives(int argc, char** argv);
