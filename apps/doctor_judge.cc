// What is wrong with the nodes and links, each as a finding of its own.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "apps/doctor_report.h"

namespace phalanx::apps {
namespace {

constexpr double kClockProblemMs = 5000;
constexpr double kClockWarningMs = 500;
constexpr double kLossProblem = 0.01;
constexpr double kMuchSlower = 4;        // than the median of the other links: a problem
constexpr double kSlower = 2;            // a warning
constexpr double kGigabit = 110e6;       // bytes/s that such a link gives
constexpr double kLateUs = 200;          // shorter round trips are never called slow
constexpr double kTypicalGather = 65536; // bytes; weighs latency against bandwidth

class Judge {
 public:
  explicit Judge(DoctorReport& report) : report_(report) {}

  void run() {
    for (const NodeReport& node : report_.nodes) look_at(node);
    for (const LinkReport& link : report_.links) {
      look_at_ports(link);
      look_at(link);
    }
    compare_links();
  }

 private:
  [[nodiscard]] const std::string& name(int server) const {
    return report_.table.servers[static_cast<size_t>(server)].address();
  }
  [[nodiscard]] std::string way(const LinkReport& link) const {
    return fmt::format("{} -> {}", name(link.from), name(link.to));
  }
  void problem(Problem p) { report_.problems.add(std::move(p)); }
  void warning(Problem p) { report_.warnings.add(std::move(p)); }

  void look_at(const NodeReport& node);
  void look_at_files(const NodeReport& node, const NodeReport& own);
  void look_at_ports(const LinkReport& link);
  void look_at(const LinkReport& link);
  void compare_links();

  DoctorReport& report_;
};

void Judge::look_at(const NodeReport& node) {
  const std::string& at = name(node.server);
  if (!node.error.empty()) {
    problem({.what = "no doctor answers there",
             .where = at,
             .found = node.error,
             .expected = "a listener on that node, and a way to it",
             .fix = "on " + at + ": phalanx doctor --listen --rank-table FILE; open the doctor's "
                    "port in its firewall"});
    return;
  }
  const NodeReport& own = report_.nodes[static_cast<size_t>(report_.own_server)];
  const auto same = [&](const std::string& what, const std::string& here, const std::string& there,
                        const std::string& fix, bool serious) {
    if (here == there) return;
    Problem p{.what = what,
              .where = at,
              .found = there,
              .expected = fmt::format("{}, as on {}", here, name(own.server)),
              .fix = fix};
    serious ? problem(std::move(p)) : warning(std::move(p));
  };
  if (own.error.empty()) {
    const std::string install = "install the same version on all nodes";
    same("another wire version", std::to_string(own.wire_version), std::to_string(node.wire_version),
         install, true);
    same("another version of the control plane", std::to_string(own.control_version),
         std::to_string(node.control_version), install, true);
    same("another numerics version", std::to_string(own.numerics_version),
         std::to_string(node.numerics_version), install, true);
    same("another build", own.build, node.build, install, false);
    same("another numeric class; all nodes will use the weakest", own.numeric_class,
         node.numeric_class, "PHALANX_CPU_ISA fixes it", false);
    same("another rank table", own.rank_table, node.rank_table,
         "copy one rank table to all nodes", true);
    look_at_files(node, own);
  }
  if (!node.tls.empty() && node.tls != "good")
    problem({.what = "certificates of this node cannot be used",
             .where = at,
             .found = node.tls,
             .expected = "",
             .fix = "phalanx certs init --rank-table FILE --out certs, then copy each node its folder"});
  if (report_.certs && node.tls.empty())
    problem({.what = "the listener there has no certificates",
             .where = at,
             .found = "no --certs",
             .expected = "TLS between nodes, as here",
             .fix = "start its listener with --certs DIR"});
  for (const DoctorPort& p : node.ports)
    if (!p.problem.empty())
      problem({.what = "a port that Phalanx needs cannot be opened",
               .where = fmt::format("{} port {} ({})", at, p.port, p.purpose),
               .found = p.problem,
               .expected = "a free port",
               .fix = "stop the program that holds it (ss -ltnp), or configure another port"});
  if (!node.memory_problem.empty())
    warning({.what = "memory bandwidth was not measured",
             .where = at,
             .found = node.memory_problem,
             .expected = "",
             .fix = "free memory there"});
}

void Judge::look_at_files(const NodeReport& node, const NodeReport& own) {
  if (own.files.empty()) return;
  if (node.files.empty()) {
    warning({.what = "the model's files were not compared",
             .where = name(node.server),
             .found = "a listener without --model",
             .expected = "",
             .fix = "start its listener with --model DIR"});
    return;
  }
  for (const auto& [file, digest] : own.files) {
    const auto there = node.files.find(file);
    const std::string found = there == node.files.end() ? "absent" : there->second;
    if (found != digest)
      problem({.what = "another file of the model",
               .where = fmt::format("{} {}", name(node.server), file),
               .found = found,
               .expected = fmt::format("{}, as on {}", digest, name(own.server)),
               .fix = "copy the checkpoint directory to that node again"});
  }
}

void Judge::look_at_ports(const LinkReport& link) {
  for (const PortReport& p : link.ports) {
    if (p.state == "open") continue;
    const bool master = link.to == report_.table.master();
    const std::string purpose = p.purpose == "control" ? "control port, multiNodesInferPort"
                                : p.purpose == "data"  ? "data port, PHALANX_DATA_PORTS"
                                : p.purpose == "any"   ? "a data port of the system's choice"
                                                       : "the doctor's port";
    Problem finding{
        .what = p.state == "blocked"  ? "port blocked: packets to it vanish"
                : p.state == "closed" ? "port refused, although the node listens there"
                                      : "port out of reach",
        .where = fmt::format("{} port {} ({})", way(link), p.port, purpose),
        .found = p.detail,
        .expected = "an open port",
        .fix = fmt::format("let {} reach TCP port {} of {} in the firewalls and rules of both and "
                           "between them{}",
                           name(link.from), p.port, name(link.to),
                           p.purpose == "any" ? ", or name the ports: PHALANX_DATA_PORTS=20000-20063"
                                              : "")};
    // Only the master's is used.
    if (p.purpose == "control" && !master)
      warning(std::move(finding));
    else
      problem(std::move(finding));
  }
}

void Judge::look_at(const LinkReport& link) {
  const bool reached = std::any_of(link.ports.begin(), link.ports.end(), [](const PortReport& p) {
    return p.purpose == "doctor" && p.state == "open";
  });
  if (!link.error.empty() && (reached || link.ports.empty()))
    problem({.what = "the link could not be measured whole",
             .where = way(link),
             .found = link.error,
             .expected = "",
             .fix = "see the findings about the two nodes, then ask again"});
  if (!link.tls.empty() && link.tls != "good")
    problem({.what = "TLS handshake fails",
             .where = way(link),
             .found = link.tls,
             .expected = "certificates of one authority, each of its node's address",
             .fix = "phalanx certs show DIR on both nodes; phalanx certs init makes new ones"});
  if (link.clock_ms && link.from < link.to && std::abs(*link.clock_ms) > kClockWarningMs) {
    Problem finding{.what = "clocks differ",
                    .where = way(link),
                    .found = fmt::format("{} is {:.1f} s {}", name(link.to),
                                         std::abs(*link.clock_ms) * 1e-3,
                                         *link.clock_ms > 0 ? "ahead" : "behind"),
                    .expected = "less than half a second",
                    .fix = "run chrony or another NTP client on both"};
    std::abs(*link.clock_ms) > kClockProblemMs ? problem(std::move(finding))
                                               : warning(std::move(finding));
  }
  const bool no_udp = link.datagrams > 0 && link.datagrams_lost == link.datagrams;
  if (no_udp) {
    warning({.what = "UDP does not pass, so packet sizes and loss were not measured",
             .where = way(link),
             .found = "no datagram was answered",
             .expected = "",
             .fix = "let UDP of the doctor's port pass while it measures; Phalanx itself needs none"});
    return;
  }
  if (link.mtu > 0 && link.mtu_arrived < link.mtu && link.datagrams > 0)
    problem({.what = "whole packets do not arrive",
             .where = way(link),
             .found = link.mtu_arrived > 0
                          ? fmt::format("the largest that does has {} bytes", link.mtu_arrived)
                          : "none of 576 bytes or more does",
             .expected = fmt::format("{} bytes, the MTU of the interface of {}", link.mtu,
                                     name(link.from)),
             .fix = "set one MTU on both interfaces and all switches between (ip link set DEV mtu N)"});
  if (link.datagrams_lost > 0) {
    const double share = static_cast<double>(link.datagrams_lost) / link.datagrams;
    Problem finding{.what = "packets are lost",
                    .where = way(link),
                    .found = fmt::format("{} of {} datagrams ({:.1f} %)", link.datagrams_lost,
                                         link.datagrams, share * 100),
                    .expected = "none",
                    .fix = "look at errors and drops of the interfaces (ip -s link), cables, duplex"};
    share >= kLossProblem ? problem(std::move(finding)) : warning(std::move(finding));
  }
}

double cost(const LinkReport& link) {
  return link.rtt_us / 2 * 1e-6 + kTypicalGather / link.bytes_per_s;
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

// The others' medians of bandwidth and round trip; its own where there are no others.
std::pair<double, double> usual_of(const LinkReport& link, const std::vector<LinkReport>& links) {
  std::vector<double> speeds;
  std::vector<double> trips;
  for (const LinkReport& other : links) {
    if (!other.measured() || &other == &link) continue;
    speeds.push_back(other.bytes_per_s);
    trips.push_back(other.rtt_us);
  }
  if (speeds.empty()) return {link.bytes_per_s, link.rtt_us};
  return {median(speeds), median(trips)};
}

bool is_late(const LinkReport& link, double usual) {
  return link.rtt_us > kMuchSlower * usual && link.rtt_us > kLateUs;
}

void Judge::compare_links() {
  const LinkReport* weakest = nullptr;
  for (const LinkReport& link : report_.links)
    if (link.measured() && (weakest == nullptr || cost(link) > cost(*weakest))) weakest = &link;
  if (weakest == nullptr) return;
  report_.weakest = fmt::format("{}: {:.0f} us round trip, {:.1f} MB/s", way(*weakest),
                                weakest->rtt_us, weakest->bytes_per_s * 1e-6);
  for (const LinkReport& link : report_.links) {
    if (!link.measured()) continue;
    const auto [usual, usual_trip] = usual_of(link, report_.links);
    if (link.bytes_per_s * kSlower < usual || link.bytes_per_s < kGigabit) {
      Problem finding{.what = "slow link",
                      .where = way(link),
                      .found = fmt::format("{:.1f} MB/s", link.bytes_per_s * 1e-6),
                      .expected = link.bytes_per_s * kSlower < usual
                                      ? fmt::format("about {:.1f} MB/s, the median of the other links",
                                                    usual * 1e-6)
                                      : "at least a gigabit per second",
                      .fix = "look at its speed (ethtool DEV), its shaping (tc qdisc) and its load"};
      link.bytes_per_s * kMuchSlower < usual ? problem(std::move(finding))
                                             : warning(std::move(finding));
    }
    if (is_late(link, usual_trip))
      warning({.what = "late link",
               .where = way(link),
               .found = fmt::format("{:.0f} us round trip", link.rtt_us),
               .expected = fmt::format("about {:.0f} us, the median of the other links", usual_trip),
               .fix = "look for a detour (traceroute), a busy node, or power saving of the interface"});
  }
}

}  // namespace

std::vector<size_t> doubtful_links(const std::vector<LinkReport>& links) {
  std::vector<size_t> found;
  for (size_t i = 0; i < links.size(); ++i) {
    if (!links[i].measured()) continue;
    const auto [speed, trip] = usual_of(links[i], links);
    if (links[i].bytes_per_s * kSlower < speed || is_late(links[i], trip) ||
        links[i].datagrams_lost > 0)
      found.push_back(i);
  }
  return found;
}

void take_better(LinkReport& link, const LinkReport& again) {
  if (!again.measured()) return;
  link.rtt_us = std::min(link.rtt_us, again.rtt_us);
  if (again.bytes_per_s > link.bytes_per_s) {
    link.bytes_per_s = again.bytes_per_s;
    link.retransmitted = again.retransmitted;
  }
  link.mtu_arrived = std::max(link.mtu_arrived, again.mtu_arrived);
  link.datagrams_lost = std::min(link.datagrams_lost, again.datagrams_lost);
}

void judge(DoctorReport& report) { Judge(report).run(); }

}  // namespace phalanx::apps
