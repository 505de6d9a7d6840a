#include "apps/doctor_report.h"

#include <nlohmann/json.hpp>

#include "apps/doctor_wire.h"
#include "phalanx/cluster/join_check.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

constexpr size_t kMostText = 2000;
constexpr size_t kMostFiles = 32;

std::string text(const json& j, const char* key) {
  return cluster::printable(j.at(key).get_ref<const std::string&>(), kMostText);
}

template <typename Body>
auto reading(Body body) {
  try {
    return body();
  } catch (const json::exception&) {
    throw Error(Code::kInvalidArgument,
                "its doctor's answer lacks what this version expects; install one version on all nodes");
  }
}

}  // namespace

json to_json(const std::vector<DoctorPort>& ports) {
  json list = json::array();
  for (const DoctorPort& p : ports)
    list.push_back({{"port", p.port}, {"purpose", p.purpose}, {"problem", p.problem}});
  return list;
}

std::vector<DoctorPort> doctor_ports_from_json(const json& j) {
  return reading([&] {
    std::vector<DoctorPort> ports;
    for (const json& p : j.get_ref<const json::array_t&>()) {
      const int port = p.at("port").get<int>();
      if (port < 0 || port > 65535 || ports.size() > static_cast<size_t>(kDoctorMostPorts) + 2)
        throw Error(Code::kInvalidArgument, "its doctor's answer has no good list of ports");
      ports.push_back({port, text(p, "purpose"), text(p, "problem")});
    }
    return ports;
  });
}

json to_json(const NodeReport& n) {
  return {{"error", n.error},
          {"build", n.build},
          {"wire_version", n.wire_version},
          {"control_version", n.control_version},
          {"numerics_version", n.numerics_version},
          {"isa", n.isa},
          {"numeric_class", n.numeric_class},
          {"rank_table", n.rank_table},
          {"files", n.files},
          {"memory_bytes", n.memory_bytes},
          {"cores", n.cores},
          {"ports", to_json(n.ports)},
          {"tls", n.tls},
          {"read_bytes_per_s", n.read_bytes_per_s},
          {"flops_per_s", n.flops_per_s},
          {"memory_problem", n.memory_problem}};
}

NodeReport node_report_from_json(const json& j, int server) {
  return reading([&] {
    NodeReport n{.server = server};
    n.build = text(j, "build");
    n.wire_version = j.at("wire_version").get<int>();
    n.control_version = j.at("control_version").get<int>();
    n.numerics_version = j.at("numerics_version").get<int>();
    n.isa = text(j, "isa");
    n.numeric_class = text(j, "numeric_class");
    n.rank_table = text(j, "rank_table");
    for (const auto& [name, digest] : j.at("files").get_ref<const json::object_t&>())
      if (n.files.size() < kMostFiles)
        n.files[cluster::printable(name, 100)] =
            cluster::printable(digest.get_ref<const std::string&>(), 100);
    n.memory_bytes = j.at("memory_bytes").get<int64_t>();
    n.cores = j.at("cores").get<int>();
    n.ports = doctor_ports_from_json(j.at("ports"));
    n.tls = text(j, "tls");
    return n;
  });
}

json to_json(const LinkReport& l) {
  json ports = json::array();
  for (const PortReport& p : l.ports)
    ports.push_back({{"port", p.port}, {"purpose", p.purpose}, {"state", p.state}, {"detail", p.detail}});
  json j = {{"from", l.from},
            {"to", l.to},
            {"failure", l.error},
            {"ports", ports},
            {"tls", l.tls},
            {"rtt_us", l.rtt_us},
            {"bytes_per_s", l.bytes_per_s},
            {"retransmitted", l.retransmitted},
            {"mtu", l.mtu},
            {"mtu_arrived", l.mtu_arrived},
            {"datagrams", l.datagrams},
            {"datagrams_lost", l.datagrams_lost}};
  j["clock_ms"] = l.clock_ms ? json(*l.clock_ms) : json(nullptr);
  return j;
}

LinkReport link_report_from_json(const json& j, int from, int to) {
  return reading([&] {
    LinkReport l{.from = from, .to = to};
    l.error = text(j, "failure");
    for (const json& p : j.at("ports").get_ref<const json::array_t&>())
      if (l.ports.size() < static_cast<size_t>(kDoctorMostPorts) + 3)
        l.ports.push_back(
            {p.at("port").get<int>(), text(p, "purpose"), text(p, "state"), text(p, "detail")});
    l.tls = text(j, "tls");
    l.rtt_us = j.at("rtt_us").get<double>();
    if (!j.at("clock_ms").is_null()) l.clock_ms = j.at("clock_ms").get<double>();
    l.bytes_per_s = j.at("bytes_per_s").get<double>();
    l.retransmitted = j.at("retransmitted").get<double>();
    l.mtu = j.at("mtu").get<int>();
    l.mtu_arrived = j.at("mtu_arrived").get<int>();
    l.datagrams = j.at("datagrams").get<int>();
    l.datagrams_lost = j.at("datagrams_lost").get<int>();
    return l;
  });
}

}  // namespace phalanx::apps
