#include "apps/doctor.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <thread>

#include "apps/config_environment.h"
#include "apps/doctor_listen.h"
#include "apps/doctor_predict.h"
#include "apps/doctor_probe.h"
#include "apps/doctor_report.h"
#include "apps/rank_spec.h"
#include "phalanx/cluster/join_check.h"
#include "phalanx/net/address.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

constexpr double kDialSeconds = 2;
constexpr double kDescribeSeconds = 30;  // digests of a large tokenizer
constexpr double kMemorySeconds = 0.4;
constexpr double kMemoryAnswerSeconds = 30;
constexpr double kProbeSeconds = 60;
constexpr double kRehearsalSeconds = 1.5;
constexpr double kNoticeSeconds = 5;

struct Arguments {
  DoctorOptions options;
  std::string address;
  bool listen = false;
  bool as_json = false;
  double seconds = 600;
  double wait = 30;
  double context = 144;
};

void notice(const std::string& text) {
  fmt::print(stderr, "doctor: {}\n", text);
  std::fflush(stderr);
}

// --address, MIES_CONTAINER_IP, HOST_IP; else the table's address of this machine, and of several
// (loopback) the first whose doctor's port is free.
int find_self(const Arguments& a) {
  const cluster::RankTable& table = a.options.table;
  const Environment environment = process_environment();
  const std::string named = variable(environment, "MIES_CONTAINER_IP");
  const std::string host = variable(environment, "HOST_IP");
  if (!a.address.empty())
    return cluster::find_own_server(table, a.address, a.address, a.options.table_path);
  if (!named.empty() || !host.empty())
    return cluster::find_own_server(table, named, host, a.options.table_path);
  int first = -1;
  for (int i = 0; i < static_cast<int>(table.servers.size()); ++i) {
    const std::string& address = a.options.address(i);
    if (!net::is_local(address)) continue;
    if (first < 0) first = i;
    if (net::port_problem(address, static_cast<uint16_t>(a.options.port)).empty()) return i;
  }
  if (first >= 0) return first;
  return cluster::find_own_server(table, "", "", a.options.table_path);  // says what there is
}

int listen(const Arguments& a) {
  const DoctorListener listener(a.options);
  const std::string& own = a.options.address(a.options.own_server);
  std::string ports;
  for (const DoctorPort& p : listener.ports()) {
    if (p.problem.empty() && ports.size() < 200) ports += fmt::format(" {}", p.port);
    if (!p.problem.empty()) notice(fmt::format("taken: {}", p.problem));
  }
  if (!a.options.tls_problem.empty()) notice("certificates: " + a.options.tls_problem);
  fmt::print("doctor: listening on {} ports{} for {} s, for {} other node{} of the rank table\n", own,
             ports, a.seconds, a.options.table.servers.size() - 1,
             a.options.table.servers.size() == 2 ? "" : "s");
  std::fflush(stdout);
  const Deadline end = Deadline::in_seconds(a.seconds);
  int64_t strangers = 0;
  Deadline next = Deadline::in_seconds(30);
  while (!end.passed()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(end.poll_ms(200) + 1));
    if (listener.strangers() != strangers) {
      if (strangers == 0)
        notice("turned away: connections or datagrams from addresses outside the rank table");
      strangers = listener.strangers();
    }
    if (!next.passed()) continue;
    next = Deadline::in_seconds(30);
    if (listener.sessions() == 0)
      notice("no other doctor has asked yet; start one: phalanx doctor --rank-table FILE");
  }
  fmt::print("doctor: {} s are over; {} connections were served\n", a.seconds, listener.sessions());
  return 0;
}

// Asks one node, over a connection of its own.
json ask(const DoctorOptions& options, int server, const json& question, double seconds) {
  DoctorStream stream = dial_doctor(options, server, Deadline::in_seconds(kDialSeconds));
  return stream.ask(question, Deadline::in_seconds(seconds));
}

NodeReport describe(const DoctorOptions& options, int server) {
  const json reply = ask(options, server, {{"op", "describe"}}, kDescribeSeconds);
  const auto version = reply.find("doctor");
  if (version == reply.end() || *version != kDoctorVersion)
    throw Error(Code::kFailedPrecondition,
                "its doctor is of another version; install the same one on all nodes");
  return node_report_from_json(reply, server);
}

// Asks all until all have answered or the wait is over.
void describe_all(const Arguments& a, DoctorReport& report) {
  const Deadline end = Deadline::in_seconds(a.wait);
  Deadline next = Deadline::in_seconds(kNoticeSeconds);
  for (;;) {
    std::string missing;
    for (NodeReport& node : report.nodes) {
      if (!node.build.empty()) continue;
      try {
        node = describe(a.options, node.server);
      } catch (const std::exception& e) {
        node.error = e.what();
        missing += fmt::format("{}{} ({})", missing.empty() ? "" : ", ",
                               a.options.address(node.server), node.error);
      }
    }
    if (missing.empty() || end.passed()) return;
    if (next.passed()) {
      notice("waiting for " + missing);
      next = Deadline::in_seconds(kNoticeSeconds);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
  }
}

void measure_memory_of(const Arguments& a, NodeReport& node) {
  try {
    const json reply = ask(a.options, node.server, {{"op", "memory"}, {"seconds", kMemorySeconds}},
                           kMemoryAnswerSeconds);
    node.read_bytes_per_s = reply.at("bytes_per_s").get<double>();
    node.flops_per_s = reply.at("flops_per_s").get<double>();
    node.memory_problem = cluster::printable(reply.at("problem").get<std::string>(), 500);
  } catch (const std::exception& e) {
    node.memory_problem = e.what();
  }
}

// All nodes at once, as they will read when they serve.
void measure_memories(const Arguments& a, DoctorReport& report) {
  notice("measuring memory bandwidth of all nodes at once");
  std::vector<std::thread> threads;
  for (NodeReport& node : report.nodes)
    if (node.error.empty()) threads.emplace_back([&a, &node] { measure_memory_of(a, node); });
  for (std::thread& thread : threads) thread.join();
}

LinkReport measure_link(const Arguments& a, const NodeReport& from, const NodeReport& to) {
  std::vector<DoctorPort> ports = to.ports;
  if (!to.error.empty()) ports = {{a.options.port, "doctor", ""}};
  try {
    return link_report_from_json(
        ask(a.options, from.server, {{"op", "probe"}, {"to", to.server}, {"ports", to_json(ports)}},
            kProbeSeconds),
        from.server, to.server);
  } catch (const std::exception& e) {
    return {.from = from.server, .to = to.server, .error = e.what(), .ports = {}};
  }
}

void measure_links(const Arguments& a, DoctorReport& report) {
  const size_t count = report.nodes.size() * (report.nodes.size() - 1);
  for (const NodeReport& from : report.nodes) {
    for (const NodeReport& to : report.nodes) {
      if (from.server == to.server || !from.error.empty()) continue;
      notice(fmt::format("{} measures the way to {} ({} of {})", a.options.address(from.server),
                         a.options.address(to.server), report.links.size() + 1, count));
      report.links.push_back(measure_link(a, from, to));
    }
  }
  // A busy moment is not a bad link: what looks bad is measured again, and the better counts.
  for (const size_t i : doubtful_links(report.links)) {
    LinkReport& link = report.links[i];
    notice(fmt::format("{} measures the way to {} again", a.options.address(link.from),
                       a.options.address(link.to)));
    take_better(link, measure_link(a, report.nodes[static_cast<size_t>(link.from)],
                                   report.nodes[static_cast<size_t>(link.to)]));
  }
}

// One rehearsal on the first works.size() ranks: every node opens its part, then all run at once.
std::vector<RehearsalResult> rehearse(const Arguments& a, const std::vector<RehearsalWork>& works) {
  const cluster::RankTable& table = a.options.table;
  const auto total = static_cast<int>(works.size());
  notice(fmt::format("rehearsing a step of {} rank{}", total, total == 1 ? "" : "s"));
  struct Part {
    int server = 0;
    std::vector<int> ranks;
    std::optional<DoctorStream> stream;
    json question, reply;
    std::optional<Error> error;
  };
  std::map<int, Part> parts;
  for (int rank = 0; rank < total; ++rank)
    parts[table.server_of_rank(rank)].ranks.push_back(rank);
  std::vector<comm::Member> members(works.size());
  for (auto& [server, part] : parts) {
    part.server = server;
    part.stream = dial_doctor(a.options, server, Deadline::in_seconds(kDialSeconds));
    const json opened = part.stream->ask(
        {{"op", "rehearse_open"}, {"ranks", part.ranks}, {"total", total}},
        Deadline::in_seconds(kMemoryAnswerSeconds));
    const auto ports = opened.at("ports").get<std::vector<uint16_t>>();
    if (ports.size() != part.ranks.size())
      throw Error(Code::kInternal, "a node opened other ports than it was asked for");
    json own = json::array();
    for (size_t i = 0; i < ports.size(); ++i) {
      const auto rank = static_cast<size_t>(part.ranks[i]);
      members[rank] = {.rank = part.ranks[i],
                       .node = server,
                       .host = a.options.address(server),
                       .data_address = a.options.address(server),
                       .data_port = ports[i]};
      own.push_back(to_json(works[rank]));
    }
    part.question = {{"op", "rehearse"}, {"works", own}, {"seconds", kRehearsalSeconds}};
  }
  const std::string token = token_to_hex(comm::random_token());
  std::vector<std::thread> threads;
  for (auto& [server, part] : parts) {
    part.question["members"] = to_json(members);
    part.question["token"] = token;
    threads.emplace_back([&part = part] {
      try {
        part.reply = part.stream->ask(part.question, Deadline::in_seconds(kProbeSeconds));
      } catch (const std::exception& e) {
        part.error.emplace(Code::kUnavailable, e.what());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::vector<RehearsalResult> results(works.size());
  for (auto& [server, part] : parts) {
    if (part.error) throw Error(*part.error);
    const auto& list = part.reply.at("results").get_ref<const json::array_t&>();
    for (size_t i = 0; i < part.ranks.size(); ++i)
      results[static_cast<size_t>(part.ranks[i])] = {.steps = list.at(i).at("steps").get<int>(),
                                                     .step_s = list.at(i).at("step_s").get<double>(),
                                                     .compute_s =
                                                         list.at(i).at("compute_s").get<double>()};
  }
  if (!(results.front().step_s > 0))
    throw Error(Code::kInvalidArgument, "a node answered with a step that took no time");
  return results;
}

// As the doctor reports: what a node answers wrongly is an error like any other.
std::vector<RehearsalResult> rehearse_or_say(const Arguments& a,
                                             const std::vector<RehearsalWork>& works) {
  try {
    return rehearse(a, works);
  } catch (const json::exception&) {
    throw Error(Code::kInvalidArgument,
                "a doctor's answer lacks what this version expects; install one version on all nodes");
  } catch (const std::out_of_range&) {
    throw Error(Code::kInvalidArgument, "a doctor answered for too few ranks");
  }
}

int examine(const Arguments& a) {
  DoctorReport report{.table = a.options.table, .own_server = a.options.own_server};
  report.certs = !a.options.certs.empty();
  for (int i = 0; i < static_cast<int>(report.table.servers.size()); ++i)
    report.nodes.push_back({.server = i});
  std::unique_ptr<DoctorListener> own;
  if (net::port_problem(a.options.address(a.options.own_server),
                        static_cast<uint16_t>(a.options.port))
          .empty())
    own = std::make_unique<DoctorListener>(a.options);
  else
    notice(fmt::format("{} port {} is taken: by a listener of this node, it is hoped",
                       a.options.address(a.options.own_server), a.options.port));
  describe_all(a, report);
  measure_memories(a, report);
  measure_links(a, report);
  judge(report);
  if (!a.options.model.empty())
    predict(report, a.options.model, a.context, [&](const std::vector<RehearsalWork>& works) {
      return rehearse_or_say(a, works);
    });
  if (a.as_json)
    fmt::print("{}\n", doctor_json(report));
  else
    fmt::print("{}", doctor_text(report));
  return report.problems.empty() ? 0 : 1;
}

}  // namespace

int doctor_main(int argc, char** argv) {
  Arguments a;
  DoctorOptions& o = a.options;
  o.port = kDoctorPort;
  o.control_port = 1120;
  CLI::App app{
      "Measures every pair of nodes before anything is started: ports, TLS, clocks, packets, latency, "
      "bandwidth, loss, versions, files, memory. 'phalanx doctor --listen --rank-table FILE' must run "
      "on the other nodes. Exit status 0, or 1 if there is a problem.",
      "phalanx doctor"};
  app.add_option("--rank-table", o.table_path, "rank table; by default RANK_TABLE_FILE");
  app.add_flag("--listen", a.listen, "answer the doctor of another node, then end by itself");
  app.add_option("--model", o.model, "checkpoint directory: files are compared, speed is predicted");
  app.add_option("--certs", o.certs, "certificates between nodes, as of phalanx serve --certs");
  app.add_flag("--json", a.as_json, "the report as JSON on stdout");
  app.add_option("--address", a.address, "own address in the rank table; by default MIES_CONTAINER_IP, "
                 "HOST_IP, or the one that this machine has");
  app.add_option("--port", o.port, "the doctor's own port (TCP and UDP), the same on all nodes")
      ->check(CLI::Range(1, 65535))->capture_default_str();
  app.add_option("--control-port", o.control_port, "multiNodesInferPort")
      ->check(CLI::Range(1, 65535))->capture_default_str();
  app.add_option("--seconds", a.seconds, "with --listen: how long")
      ->check(CLI::Range(1.0, 86400.0))->capture_default_str();
  app.add_option("--wait", a.wait, "seconds to wait for listeners that do not answer")
      ->check(CLI::Range(0.0, 3600.0))->capture_default_str();
  app.add_option("--context", a.context, "positions in the cache, for the prediction")
      ->check(CLI::Range(1.0, 1e7))->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  const Environment environment = process_environment();
  NodeConfig config;
  Problems problems;
  if (o.table_path.empty()) o.table_path = rank_table_path(environment, config);
  if (o.table_path.empty())
    throw Error(Code::kInvalidArgument,
                "no rank table. Fix: --rank-table FILE, or export RANK_TABLE_FILE");
  o.table = cluster::load_rank_table(o.table_path);
  read_environment(environment, config, problems);
  problems.throw_if_any("environment");
  o.data_begin = config.data_port_begin;
  o.data_end = config.data_port_end;
  o.own_server = find_self(a);
  load_doctor_certificates(o);
  return a.listen ? listen(a) : examine(a);
}

}  // namespace phalanx::apps
