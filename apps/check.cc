#include "apps/check.h"

#include <fmt/format.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "apps/check_installation.h"
#include "apps/config_plugins.h"
#include "apps/config_security.h"
#include "apps/draft_model.h"
#include "apps/node.h"
#include "apps/serve.h"
#include "phalanx/api/plane_tls.h"
#include "phalanx/models/registry.h"
#include "phalanx/net/address.h"
#include "phalanx/text/chat_template.h"
#include "phalanx/text/tokenizer.h"

namespace phalanx::apps {
namespace {

constexpr int64_t kExpiryDays = 30;
constexpr int64_t kFilesBesideClients = 512;  // sockets, logs, weights, memory

// Runs `body`; what it throws is a finding at `where`.
template <typename Body>
void collect(Problems& problems, const std::string& where, Body body) {
  try {
    body();
  } catch (const std::exception& error) {
    problems.add({.what = error.what(), .where = where});
  }
}

bool is_master(const NodeConfig& config) {
  return config.table.servers.empty() || config.own_server == config.table.master();
}

// What is said of good certificates, and of planes that share one.
class Certificates {
 public:
  explicit Certificates(CheckReport& report) : report_(report) {}

  void look(const std::string& plane, const net::TlsMaterial& material) {
    const net::CertificateInfo& own = material.own();
    const std::string& file = material.files().certificate;
    report_.facts.push_back(fmt::format("{}: certificate {} until {} ({})", plane, own.subject,
                                        net::time_text(own.not_after), own.key_type));
    if (const auto text = api::expiry_warning(own, std::time(nullptr), kExpiryDays); !text.empty())
      report_.warnings.add(
          {.what = text, .where = file, .fix = "renew it: phalanx certs renew"});
    const auto [first, fresh] = first_of_.emplace(own.fingerprint, std::pair(plane, file));
    if (!fresh)
      report_.warnings.add(
          {.what = "planes share a certificate",
           .where = file,
           .found = fmt::format("that of {} ({}), also for {}", first->second.first,
                                first->second.second, plane),
           .expected = "one for each of business, management, metrics and the traffic between nodes",
           .fix = "phalanx certs init makes different ones"});
  }

 private:
  CheckReport& report_;
  std::map<std::string, std::pair<std::string, std::string>> first_of_;  // by fingerprint
};

void check_certificates(const NodeConfig& config, CheckReport& report) {
  Certificates certificates(report);
  // Read and judged with the configuration, on every node.
  if (config.inter_node.material != nullptr) {
    certificates.look("between nodes", *config.inter_node.material);
    report.facts.push_back(
        fmt::format("between nodes: TLS on the control port{}",
                    config.inter_node.transport == comm::Transport::kUcx
                        ? " and for the proof on the data ports, tensors in clear over UCX"
                    : config.inter_node.data_plane ? " and the data ports"
                                                   : ", clear data ports"));
  } else if (config.table.servers.size() > 1 && report.problems.empty()) {
    report.facts.push_back(config.inter_node.transport == comm::Transport::kUcx
                               ? "between nodes: no TLS, no certificates needed, tensors over UCX"
                               : "between nodes: no TLS, no certificates needed");
  }
  if (!is_master(config)) return;
  const ServerConfig& server = config.server;
  if (!server.https) {
    report.facts.push_back("HTTP planes: no TLS, no certificates needed");
    return;
  }
  for (const PlaneListener& listener : plane_listeners(server)) {
    const auto context =
        api::PlaneTls::load(listener_tls(listener, server), report.problems, report.warnings);
    if (context) certificates.look(listener.tls->plane + " plane", context->material());
  }
}

// Every rank takes one of PHALANX_DATA_PORTS, if they are named.
void check_data_ports(const NodeConfig& config, CheckReport& report) {
  if (config.table.servers.size() < 2 || config.data_port_end == 0) return;
  const cluster::Server& own = config.table.servers[static_cast<size_t>(config.own_server)];
  const auto wanted = static_cast<int>(own.devices.size());
  int free = 0;
  std::string reason;
  for (int port = config.data_port_begin; port <= config.data_port_end && free < wanted; ++port) {
    const std::string problem = net::port_problem(own.address(), static_cast<uint16_t>(port));
    if (problem.empty())
      ++free;
    else
      reason = problem;
  }
  const std::string range =
      fmt::format("{}-{} of {}", config.data_port_begin, config.data_port_end, own.address());
  if (free >= wanted)
    report.facts.push_back(fmt::format("data ports {}: enough are free for {} rank{}", range, wanted,
                                       wanted == 1 ? "" : "s"));
  else
    report.problems.add({.what = "too few free data ports",
                         .where = "environment variable PHALANX_DATA_PORTS",
                         .found = fmt::format("{} free of {} ({})", free, range, reason),
                         .expected = fmt::format("{}, one for each rank of this node", wanted),
                         .fix = "name a wider range, the same on every node"});
}

void check_ports(const NodeConfig& config, CheckReport& report) {
  check_data_ports(config, report);
  if (!is_master(config)) {
    report.facts.push_back("ports: this node is a slave, it opens no HTTP port");
    return;
  }
  const auto look = [&](const std::string& address, int port, const std::string& key) {
    const std::string reason = net::port_problem(address, static_cast<uint16_t>(port));
    if (reason.empty()) {
      report.facts.push_back(fmt::format("port {} of {} is free ({})", port, address, key));
      return;
    }
    report.problems.add(
        {.what = "cannot listen there",
         .where = key,
         .found = fmt::format("{} port {}: {}", address, port, reason),
         .expected = "a free port on an address of this machine",
         .fix = net::is_local(address)
                    ? fmt::format("stop the program that uses it (ss -ltnp 'sport = :{}'), or "
                                  "configure another port",
                                  port)
                    : fmt::format("configure one of {}", net::own_addresses_text())});
  };
  std::set<std::pair<std::string, int>> seen;
  const ServerConfig& s = config.server;
  for (const auto& [address, port, key] :
       {std::tuple{s.ip_address, s.port, "ServerConfig.port"},
        std::tuple{s.management_ip_address, s.management_port, "ServerConfig.managementPort"},
        std::tuple{s.management_ip_address, s.metrics_port, "ServerConfig.metricsPort"}})
    if (seen.insert({address, port}).second) look(address, port, key);
  if (config.backend.multi_nodes && !config.table.servers.empty()) {
    const std::string own = config.table.servers[static_cast<size_t>(config.own_server)].address();
    look(own, config.backend.multi_nodes_port, "BackendConfig.multiNodesInferPort");
  }
}

std::string limit_text(rlim_t value) {
  return value == RLIM_INFINITY ? "unlimited" : fmt::format("{}", value);
}

void check_limits(const NodeConfig& config, const HostResources& host, CheckReport& report) {
  rlimit limit{};
  const auto needed =
      static_cast<rlim_t>(3 * config.server.max_link_num + 100 + kFilesBesideClients);
  if (::getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_max != RLIM_INFINITY &&
      limit.rlim_max < needed)
    report.warnings.add({.what = "too few open files for maxLinkNum",
                         .where = "ulimit -Hn",
                         .found = limit_text(limit.rlim_max),
                         .expected = fmt::format("at least {}", needed),
                         .fix = "raise LimitNOFILE of the service, or lower maxLinkNum"});
  else
    report.facts.push_back(fmt::format("open files: {} allowed, {} needed at most",
                                       limit_text(limit.rlim_max), needed));
  if (::getrlimit(RLIMIT_MEMLOCK, &limit) == 0)
    report.facts.push_back(fmt::format("locked memory: {} bytes allowed; only private keys are locked",
                                       limit_text(limit.rlim_max)));
  report.facts.push_back(fmt::format("memory: {} usable ({}), {} cores{}",
                                     format_bytes(host.memory_bytes), host.memory_source,
                                     host.usable_cores(),
                                     host.cpu_quota > 0
                                         ? fmt::format(" (quota of the cgroup: {:.2f})", host.cpu_quota)
                                         : std::string()));
  struct statvfs shm {};
  report.facts.push_back(fmt::format(
      "/dev/shm: {}, not used: shared memory is memfd, so neither its size nor --shm-size matters",
      ::statvfs("/dev/shm", &shm) == 0
          ? format_bytes(static_cast<int64_t>(shm.f_frsize) * static_cast<int64_t>(shm.f_blocks))
          : std::string("none")));
}

// False, after naming why, if there is one on this node and it cannot be used.
bool draft_model_is_good(const NodeConfig& config, Problems& problems) {
  if (!runs_draft_model(config)) return true;
  std::error_code error;
  if (!std::filesystem::is_regular_file(config.plugins.draft_model + "/config.json", error))
    return false;  // said already
  const size_t before = problems.list().size();
  Problems of_the_model;  // said below
  collect(of_the_model, config.model.weight_path, [&] {
    check_draft_model(config, models::read_model_info(config.model.weight_path), problems);
  });
  return problems.list().size() == before && of_the_model.empty();
}

void check_model(const HostResources& host, bool with_text, CheckReport& report) {
  const NodeConfig& config = report.config;
  const std::string& folder = config.model.weight_path;
  std::error_code error;
  if (!std::filesystem::is_regular_file(folder + "/config.json", error)) return;  // said already
  if (config.table.servers.empty()) {
    // Without a rank table there is no cut, but the files can be looked at.
    collect(report.problems, folder, [&] {
      (void)models::read_model_info(folder);
      models::check_checkpoint(folder);
    });
  } else {
    NodeConfig planned = config;
    if (!draft_model_is_good(config, report.problems)) planned.plugins.draft_model.clear();
    collect(report.problems, folder, [&] {
      report.plan = plan_node(planned, host);
      int64_t weights = 0;
      for (const models::MemoryNeed& need : report.plan->needs) weights += need.weight_bytes;
      report.facts.push_back(fmt::format(
          "model {}: {}, {} layers, {} of weights on this node, KV cache up to {} per rank",
          config.model.name, report.plan->info.model_type, report.plan->info.num_layers,
          format_bytes(weights), format_bytes(report.plan->kv_bytes_per_rank)));
      for (std::string& line : format_report(config, *report.plan))
        report.facts.push_back(std::move(line));
    });
  }
  if (!with_text || !is_master(config)) return;
  const size_t before = report.problems.list().size();
  collect(report.problems, folder, [&] { (void)text::Tokenizer::load(folder); });
  collect(report.problems, folder, [&] {
    (void)text::ChatTemplate::load(folder, config.model.chat_template.value_or(""));
  });
  if (report.problems.list().size() == before)
    report.facts.push_back("tokenizer and chat template can be read");
}

}  // namespace

api::PlaneTls::Plane listener_tls(const PlaneListener& listener, const ServerConfig& server) {
  return {.files = *listener.tls,
          .needs = {.server = true, .fix = "phalanx certs init"},
          .address = listener.address,
          .mutual = server.client_certificates};
}

CheckReport check_start(const ServeArguments& arguments, const Environment& environment,
                        const CheckOptions& options) {
  CheckReport report;
  report.config = examine_node_config(arguments, environment, report.problems, report.warnings);
  const NodeConfig& config = report.config;
  // Without settings there is nothing to hold the rest against.
  if (config.model.weight_path.empty() && !report.problems.empty()) return report;
  if (!config.config_path.empty())
    report.facts.push_back(fmt::format("configuration {}", config.config_path));
  check_installation(config.home, report.problems, report.warnings);
  check_certificates(config, report);
  const HostResources host = host_resources();
  if (options.ports) check_ports(config, report);
  check_limits(config, host, report);
  check_model(host, options.text, report);
  for (const std::string& warning : config.warnings) report.warnings.add({.what = warning});
  return report;
}

std::string findings_table(const Problems& findings) {
  std::string text;
  int number = 0;
  for (const Problem& p : findings.list()) {
    const std::string indent = "     ";
    text += fmt::format("{:>3}. {}\n", ++number, p.where.empty() ? p.what : p.where);
    if (!p.where.empty()) text += fmt::format("{}rule:  {}\n", indent, p.what);
    if (!p.expected.empty()) text += fmt::format("{}want:  {}\n", indent, p.expected);
    if (!p.found.empty()) text += fmt::format("{}found: {}\n", indent, p.found);
    if (!p.fix.empty()) text += fmt::format("{}mend:  {}\n", indent, p.fix);
  }
  return text;
}

nlohmann::ordered_json findings_json(const Problems& findings) {
  auto list = nlohmann::ordered_json::array();
  for (const Problem& p : findings.list())
    list.push_back({{"what", p.what},
                    {"where", p.where},
                    {"found", p.found},
                    {"expected", p.expected},
                    {"fix", p.fix}});
  return list;
}

std::string to_json(const CheckReport& report) {
  const nlohmann::ordered_json json = {{"ok", report.problems.empty()},
                                       {"problems", findings_json(report.problems)},
                                       {"warnings", findings_json(report.warnings)},
                                       {"facts", report.facts}};
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

int check_main(int argc, char** argv) {
  CLI::App app{
      "Checks everything a start needs, without loading: configuration, files and their modes, "
      "certificates, ports, limits, memory, model. Exit status 0, or 1 if a start would be refused."};
  ServeArguments arguments;
  add_serve_options(app, arguments);
  bool json = false;
  bool no_ports = false;
  app.add_flag("--json", json, "findings as JSON on stdout");
  app.add_flag("--no-ports", no_ports, "do not try the ports (the server is running)");
  CLI11_PARSE(app, argc, argv);
  hide_secrets(arguments, argc, argv);

  const CheckReport report =
      check_start(arguments, process_environment(), {.ports = !no_ports, .text = true});
  if (json) {
    fmt::print("{}\n", to_json(report));
    return report.problems.empty() ? 0 : 1;
  }
  for (const std::string& fact : report.facts) fmt::print("  ok   {}\n", fact);
  if (!report.warnings.empty()) fmt::print("\nwarnings:\n{}", findings_table(report.warnings));
  if (report.problems.empty()) {
    fmt::print("\nphalanx check: a start would not be refused\n");
    return 0;
  }
  fmt::print("\nproblems:\n{}\nphalanx check: {} problem{}\n", findings_table(report.problems),
             report.problems.list().size(), report.problems.list().size() == 1 ? "" : "s");
  return 1;
}

}  // namespace phalanx::apps
