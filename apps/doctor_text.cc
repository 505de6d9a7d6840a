// A report as people and as programs read it.

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "apps/check.h"
#include "apps/doctor_report.h"
#include "apps/host.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

std::string nodes_text(const DoctorReport& report) {
  std::string text = fmt::format("{:<18} {:>8} {:>5} {:>9} {:<12} {:>5} {:>11} {:>10}  {}\n", "node",
                                 "build", "wire", "numerics", "kernels", "cores", "free memory",
                                 "read GB/s", "certificates");
  for (const NodeReport& n : report.nodes) {
    const std::string& name = report.table.servers[static_cast<size_t>(n.server)].address();
    if (!n.error.empty()) {
      text += fmt::format("{:<18} no answer: {}\n", name, n.error);
      continue;
    }
    text += fmt::format(
        "{:<18} {:>8} {:>5} {:>9} {:<12} {:>5} {:>11} {:>10}  {}\n", name, n.build, n.wire_version,
        n.numerics_version, n.isa, n.cores, format_bytes(n.memory_bytes),
        n.read_bytes_per_s > 0 ? fmt::format("{:.1f}", n.read_bytes_per_s * 1e-9) : "-",
        n.tls.empty() ? "none" : n.tls == "good" ? "good" : "bad");
  }
  return text;
}

std::string ports_word(const LinkReport& link) {
  const auto open = std::count_if(link.ports.begin(), link.ports.end(),
                                  [](const PortReport& p) { return p.state == "open"; });
  return fmt::format("{}/{}", open, link.ports.size());
}

// Rows: from; columns: to; one table for each thing that is measured.
template <typename Cell>
std::string table_text(const DoctorReport& report, const std::string& title, Cell cell) {
  std::string text = fmt::format("{:<18}", title);
  for (const cluster::Server& s : report.table.servers) text += fmt::format(" {:>15}", s.address());
  text += '\n';
  for (const NodeReport& from : report.nodes) {
    text += fmt::format("  {:<16}",
                        report.table.servers[static_cast<size_t>(from.server)].address());
    for (const NodeReport& to : report.nodes) {
      const auto at = std::find_if(
          report.links.begin(), report.links.end(),
          [&](const LinkReport& l) { return l.from == from.server && l.to == to.server; });
      std::string word = "?";
      if (from.server == to.server) word = ".";
      else if (at != report.links.end()) word = cell(*at);
      text += fmt::format(" {:>15}", word);
    }
    text += '\n';
  }
  return text;
}

}  // namespace

std::string doctor_text(const DoctorReport& report) {
  std::string text = nodes_text(report);
  if (!report.links.empty()) {
    text += "\nfrom a row's node to a column's:\n";
    const auto number = [](double value, const char* format) {
      return value < 0 ? std::string("-") : fmt::format(fmt::runtime(format), value);
    };
    text += table_text(report, "ports open", ports_word);
    if (report.certs)
      text += table_text(report, "TLS", [](const LinkReport& l) {
        return l.tls.empty() ? std::string("-") : l.tls == "good" ? std::string("good") : "fails";
      });
    text += table_text(report, "round trip us",
                       [&](const LinkReport& l) { return number(l.rtt_us, "{:.0f}"); });
    text += table_text(report, "MB/s", [&](const LinkReport& l) {
      return number(l.bytes_per_s < 0 ? -1 : l.bytes_per_s * 1e-6, "{:.1f}");
    });
    text += table_text(report, "whole packets", [](const LinkReport& l) {
      if (l.mtu == 0) return std::string("-");
      return l.mtu == l.mtu_arrived ? fmt::format("{}", l.mtu)
                                    : fmt::format("{} of {}", l.mtu_arrived, l.mtu);
    });
    text += table_text(report, "lost %", [](const LinkReport& l) {
      return l.datagrams == 0 ? std::string("-")
                              : fmt::format("{:.1f}", 100.0 * l.datagrams_lost / l.datagrams);
    });
    text += table_text(report, "sent again %", [&](const LinkReport& l) {
      return number(l.retransmitted < 0 ? -1 : l.retransmitted * 100, "{:.2f}");
    });
    text += table_text(report, "clock ms", [](const LinkReport& l) {
      return l.clock_ms ? fmt::format("{:+.1f}", *l.clock_ms) : std::string("-");
    });
  }
  if (!report.weakest.empty()) text += fmt::format("\nweakest link: {}\n", report.weakest);
  if (!report.prediction.empty()) text += '\n';
  for (const std::string& line : report.prediction) text += line + '\n';
  if (!report.warnings.empty()) text += "\nwarnings:\n" + findings_table(report.warnings);
  if (!report.problems.empty()) text += "\nproblems:\n" + findings_table(report.problems);
  const size_t count = report.problems.list().size();
  text += count == 0 ? std::string("\nphalanx doctor: nothing stands in the way of a start\n")
                     : fmt::format("\nphalanx doctor: {} problem{}\n", count, count == 1 ? "" : "s");
  return text;
}

std::string doctor_json(const DoctorReport& report) {
  json nodes = json::array();
  const auto name = [&](int server) {
    return report.table.servers[static_cast<size_t>(server)].address();
  };
  for (const NodeReport& n : report.nodes) {
    nodes.push_back(to_json(n));
    nodes.back()["address"] = name(n.server);
  }
  json links = json::array();
  for (const LinkReport& l : report.links) {
    links.push_back(to_json(l));
    links.back()["from"] = name(l.from);
    links.back()["to"] = name(l.to);
  }
  json speeds = json::array();
  for (const DoctorReport::Speed& s : report.speeds)
    speeds.push_back({{"ranks", s.ranks},
                      {"tokens_per_s", s.tokens_per_s},
                      {"compute_s", s.compute_s},
                      {"exchange_s", s.exchange_s}});
  const json all = {{"ok", report.problems.empty()},      {"nodes", nodes},
                    {"links", links},                     {"weakest", report.weakest},
                    {"prediction", speeds},               {"problems", findings_json(report.problems)},
                    {"warnings", findings_json(report.warnings)}};
  return all.dump(2, ' ', false, json::error_handler_t::replace);
}

}  // namespace phalanx::apps
