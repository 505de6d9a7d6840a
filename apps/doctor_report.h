#pragma once

// What `phalanx doctor` finds out, and how it travels between nodes and is told.

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/cluster/rank_table.h"

namespace phalanx::apps {

// A port that a node's listener holds, or could not take (`problem` says why).
struct DoctorPort {
  int port = 0;
  std::string purpose;  // "doctor", "control", "data", "any"
  std::string problem;
};

// One node, as its listener describes it.
struct NodeReport {
  int server = 0;             // index in the rank table
  std::string error;          // why it gave no answer; all below is empty then
  std::string build;
  int wire_version = 0, control_version = 0, numerics_version = 0;
  std::string isa, numeric_class;
  std::string rank_table;     // digest
  std::map<std::string, std::string> files;  // digests of the model's files; empty: no --model there
  int64_t memory_bytes = 0;   // free
  int cores = 0;              // usable
  std::vector<DoctorPort> ports;
  std::string tls;            // "" (no --certs), "good", or what is wrong with the certificates
  double read_bytes_per_s = 0;     // all nodes reading at once; 0: not measured
  double flops_per_s = 0;
  std::string memory_problem;      // why the bandwidth was not measured
};

// How a try of a port ended: "open", "closed" (refused), "blocked" (no answer), "unreachable".
struct PortReport {
  int port = 0;
  std::string purpose;
  std::string state;
  std::string detail;  // errno's words
};

// One direction of a pair of nodes, measured from `from`.
struct LinkReport {
  int from = 0, to = 0;           // indices in the rank table
  std::string error;              // why it ended early
  std::vector<PortReport> ports;
  std::string tls;                // "" (not tried), "good", or the reason
  double rtt_us = -1;             // median of small messages; -1: not measured
  std::optional<double> clock_ms; // clock of `to` minus clock of `from`
  double bytes_per_s = -1;
  double retransmitted = -1;      // share of the segments of the transfer
  int mtu = 0;                    // of the interface of `from`; 0: not measured
  int mtu_arrived = 0;            // largest whole packet that arrived
  int datagrams = 0, datagrams_lost = 0;
  [[nodiscard]] bool measured() const { return rtt_us >= 0 && bytes_per_s > 0; }
};

[[nodiscard]] nlohmann::json to_json(const NodeReport& node);
[[nodiscard]] nlohmann::json to_json(const LinkReport& link);
// From another node: types and sizes are checked, texts made printable. Throw
// Error(kInvalidArgument).
[[nodiscard]] NodeReport node_report_from_json(const nlohmann::json& j, int server);
[[nodiscard]] LinkReport link_report_from_json(const nlohmann::json& j, int from, int to);

[[nodiscard]] nlohmann::json to_json(const std::vector<DoctorPort>& ports);
[[nodiscard]] std::vector<DoctorPort> doctor_ports_from_json(const nlohmann::json& j);

struct DoctorReport {
  cluster::RankTable table;
  int own_server = 0;
  std::vector<NodeReport> nodes;  // one per server of the table
  std::vector<LinkReport> links;
  bool certs = false;             // --certs was given
  Problems problems;              // the exit status is 1
  Problems warnings;
  std::string weakest;            // a sentence; empty: nothing was measured
  std::vector<std::string> prediction;  // lines; empty: no --model
  struct Speed {
    int ranks = 0;
    double tokens_per_s = 0;
    double compute_s = 0;   // of one token, on the slowest rank
    double exchange_s = 0;  // the rest: gathers, waiting for others and for cores
  };
  std::vector<Speed> speeds;
};

// Of the measured links, those that a busy moment may have made look bad.
[[nodiscard]] std::vector<size_t> doubtful_links(const std::vector<LinkReport>& links);
// Of two measurements of a link, the better values.
void take_better(LinkReport& link, const LinkReport& again);

// Fills problems, warnings and weakest from nodes and links.
void judge(DoctorReport& report);

// The matrix, the weakest link, findings, prediction.
[[nodiscard]] std::string doctor_text(const DoctorReport& report);
[[nodiscard]] std::string doctor_json(const DoctorReport& report);

}  // namespace phalanx::apps
