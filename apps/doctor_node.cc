#include "apps/doctor_node.h"

#include <fmt/format.h>

#include <algorithm>

#include "apps/bench_roofline.h"
#include "apps/build_identity.h"
#include "apps/config_environment.h"
#include "apps/config_inter_node.h"
#include "apps/file_digest.h"
#include "apps/host.h"
#include "phalanx/base/clock.h"
#include "phalanx/cluster/control.h"
#include "phalanx/ops/isa.h"

namespace phalanx::apps {
namespace {

constexpr int64_t kMemoryForMeasuring = int64_t{1} << 30;  // free, before 512 MiB are taken

// The threads that ranks on this node will compute with.
int compute_threads(const NodeConfig& config, const HostResources& host) {
  const int cores = host.usable_cores();
  return config.threads_per_rank > 0 ? std::min(cores, config.threads_per_rank) : cores;
}

}  // namespace

void load_doctor_certificates(DoctorOptions& options) {
  if (options.certs.empty()) return;
  Problems problems;
  Problems warnings;
  const InterNodeTls tls =
      load_inter_node_tls({.table = options.table,
                           .own_server = options.own_server,
                           .written = true,
                           .how_to_switch_off = "leave --certs out",
                           .data_plane = "",
                           .table_path = options.table_path,
                           .home = options.certs,
                           .certs = options.certs},
                          {}, problems, warnings);
  options.tls = tls.material;
  for (const Problem& p : problems.list())
    options.tls_problem += (options.tls_problem.empty() ? "" : "; ") + to_string(p);
}

NodeReport describe_node(const DoctorOptions& options) {
  const HostResources host = host_resources();
  NodeReport node{.server = options.own_server};
  node.build = build_identity().release;
  node.wire_version = static_cast<int>(build_identity().wire_version);
  node.control_version = cluster::kControlVersion;
  node.numerics_version = static_cast<int>(build_identity().numerics_version);
  const ops::Isa isa = ops::choose_isa();
  node.isa = ops::isa_name(isa);
  node.numeric_class = ops::numeric_class_name(ops::numeric_class_of(isa));
  node.rank_table = options.table.digest();
  if (!options.model.empty()) {
    for (const char* name :
         {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"})
      node.files[name] = file_digest(options.model + "/" + name);
    node.files["weights (headers)"] = weights_digest(options.model);
  }
  node.memory_bytes = host.memory_bytes;
  node.cores = host.usable_cores();
  if (!options.certs.empty())
    node.tls = options.tls != nullptr ? "good" : options.tls_problem;
  return node;
}

MemorySpeed measure_memory(double seconds) {
  NodeConfig config;
  Problems ignored;  // a bad variable is named at the start and by `phalanx check`
  read_environment(process_environment(), config, ignored);
  if (config.memory_gbps > 0) return {.read_bytes_per_s = config.memory_gbps * 1e9};
  const HostResources host = host_resources();
  if (host.memory_bytes < kMemoryForMeasuring)
    return {.problem = fmt::format("only {} of memory are free, measuring needs {}",
                                   format_bytes(host.memory_bytes), format_bytes(kMemoryForMeasuring))};
  const int threads = compute_threads(config, host);
  std::vector<int> cpus;
  if (static_cast<size_t>(threads) == host.cpus.size()) cpus = host.cpus;
  Machine machine(threads, cpus, models::ModelInfo{});
  for (const Deadline end = Deadline::in_seconds(seconds); !end.passed();) machine.measure();
  return {.read_bytes_per_s = machine.steady_bytes_per_second(),
          .flops_per_s = machine.steady_flops_per_second(),
          .problem = ""};
}

}  // namespace phalanx::apps
