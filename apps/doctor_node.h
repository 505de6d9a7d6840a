#pragma once

// This node, as the doctor sees it.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "apps/doctor_report.h"
#include "phalanx/cluster/rank_table.h"
#include "phalanx/net/tls_material.h"

namespace phalanx::apps {

struct DoctorOptions {
  std::string table_path;
  cluster::RankTable table;
  int own_server = 0;
  std::string model;        // --model; empty: no files are compared here
  std::string certs;        // --certs; empty: no TLS
  int port = 0;             // the doctor's own, on every node
  int control_port = 0;     // multiNodesInferPort
  int data_begin = 0, data_end = 0;  // PHALANX_DATA_PORTS; 0: any
  std::shared_ptr<const net::TlsMaterial> tls;  // null: none, or tls_problem says why
  std::string tls_problem;

  [[nodiscard]] const std::string& address(int server) const {
    return table.servers[static_cast<size_t>(server)].address();
  }
};

// Loads the certificates of --certs into `tls` or says why not in `tls_problem`.
void load_doctor_certificates(DoctorOptions& options);

// Versions, digests, memory, cores; no ports, no bandwidth.
[[nodiscard]] NodeReport describe_node(const DoctorOptions& options);

struct MemorySpeed {
  double read_bytes_per_s = 0;
  double flops_per_s = 0;
  std::string problem;  // why it was not measured
};
// Read bandwidth and peak of all usable cores, over about `seconds`. Takes 512 MiB for as long.
// Where PHALANX_MEMORY_GBPS says the bandwidth nothing is measured.
[[nodiscard]] MemorySpeed measure_memory(double seconds);

}  // namespace phalanx::apps
