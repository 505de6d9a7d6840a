#include "apps/bench_collectives.h"

int main(int argc, char** argv) { return bench_collectives(argc, argv); }
