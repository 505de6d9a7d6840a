#include <fmt/format.h>

#include <CLI/Error.hpp>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <string_view>

#include "apps/bench.h"
#include "apps/build_identity.h"
#include "apps/certs.h"
#include "apps/check.h"
#include "apps/config_make.h"
#include "apps/doctor.h"
#include "apps/hccn.h"
#include "apps/import.h"
#include "apps/make_random_model.h"
#include "apps/rank.h"
#include "apps/ranktable.h"
#include "apps/run.h"
#include "apps/one_prompt.h"
#include "apps/quantize.h"
#include "apps/serve.h"
#include "apps/status.h"
#include "phalanx/net/secret.h"

namespace phalanx::apps {
namespace {

struct Command {
  std::string_view name;
  int (*run)(int, char**);
  std::string_view summary;
};

int run_rank(int, char**) { return rank_main(); }

constexpr Command kCommands[] = {
    {"serve", serve_main, "start a node (config.json and rank table, or --model DIR)"},
    {"run", run_main, "offline inference with the options of run_pa"},
    {"status", status_main, "nodes, ranks, states and load of a running instance"},
    {"ranktable", ranktable_main, "make, check or show a rank table"},
    {"check", check_main, "everything a start needs, without loading; exit status 0 or 1"},
    {"doctor", doctor_main, "every pair of nodes measured before a start, and a predicted speed"},
    {"certs", certs_main, "an authority and certificates for all nodes; renew, revoke, import, show"},
    {"hccn", hccn_main, "the addresses and links of this node, in the words of hccn_tool"},
    {"config", config_main, "write a config.json"},
    {"import", import_main, "GGUF file to a checkpoint directory"},
    {"quantize", quantize_main, "float checkpoint to 8 or 4 bits"},
    {"make-random-model", make_random_model, "a random checkpoint of a given shape, for benchmarks"},
    {"bench", bench_main, "memory, flops, gemm, attention, collectives, engine"},
    {"self-test", one_prompt_main, "answer one prompt with the configured model"},
};

int usage(std::FILE* out) {
  fmt::print(out, "phalanx {}: several servers answer as one\n\nusage: phalanx <command> [options]\n\n",
             PHALANX_VERSION);
  for (const Command& command : kCommands)
    fmt::print(out, "  {:<18} {}\n", command.name, command.summary);
  fmt::print(out, "\n'phalanx <command> --help' lists its options.\n");
  return out == stdout ? 0 : 2;
}

// Daemons of other systems start by these names.
int (*command_of_program(std::string_view program))(int, char**) {
  if (program == "mindieservice_daemon" || program == "mindie_llm_server") return serve_main;
  if (program == "llm_engine_test") return one_prompt_main;
  if (program == "run_pa") return run_main;
  if (program == "hccn_tool") return hccn_main;
  return nullptr;
}

int dispatch(int argc, char** argv) {
  const std::string program = std::filesystem::path(argv[0]).filename();
  if (auto* run = command_of_program(program)) return run(argc, argv);
  if (argc < 2) return usage(stderr);
  const std::string_view name = argv[1];
  if (name == "--help" || name == "-h" || name == "help") return usage(stdout);
  if (name == "--version") {
    fmt::print("phalanx {}\n", build_identity().release);
    return 0;
  }
  if (name == "rank") return run_rank(argc, argv);
  for (const Command& command : kCommands)
    if (command.name == name) return command.run(argc - 1, argv + 1);
  fmt::print(stderr, "phalanx: unknown command '{}'\n\n", name);
  return usage(stderr);
}

}  // namespace
}  // namespace phalanx::apps

int main(int argc, char** argv) {
  phalanx::net::protect_keys();
  try {
    return phalanx::apps::dispatch(argc, argv);
  } catch (const std::exception& e) {
    std::fflush(stdout);
    fmt::print(stderr, "phalanx: {}\n", e.what());
    return 1;
  }
}
