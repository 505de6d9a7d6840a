#pragma once

namespace phalanx::apps {

// Each prints the machine's floor or peak, measured in the same run, beside the result and their
// ratio, as a table. Options: --help. They return the exit status; bad options throw Error.
int bench_memory(int argc, char** argv);     // read bandwidth of 1 ... n threads
int bench_flops(int argc, char** argv);      // peak of each kernel path, one and all threads
int bench_gemm(int argc, char** argv);       // linear layers of a 1B model, decode and prefill
int bench_attention(int argc, char** argv);  // attention of a 1B model, decode and prefill

}  // namespace phalanx::apps
