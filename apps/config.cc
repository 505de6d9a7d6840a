#include "apps/config.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <netdb.h>
#include <netinet/in.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <filesystem>
#include <set>

#include "apps/certs_layout.h"
#include "apps/config_adapters.h"
#include "apps/config_environment.h"
#include "apps/config_file.h"
#include "apps/config_plugins.h"
#include "apps/config_security.h"
#include "apps/config_weights.h"
#include "phalanx/base/guarded_file.h"
#include "phalanx/models/kv_format.h"
#include "phalanx/net/address.h"
#include "phalanx/net/digest.h"

namespace phalanx::apps {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMostRanks = 512;
constexpr int64_t kLongestContextWithoutFile = 8192;
constexpr int64_t kLongestOutputWithoutFile = 2048;

bool is_all_zero(const std::string& address) {
  const auto parsed = net::Address::parse(address);
  return parsed && parsed->is_all_zero();
}

std::string executable_home() {
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  return error ? std::string(".") : program.parent_path().parent_path().string();
}

std::string find_home(const Environment& environment) {
  for (const char* name : {"MINDIE_LLM_HOME_PATH", "MIES_INSTALL_PATH"}) {
    const std::string home = variable(environment, name);
    if (!home.empty()) return home;
  }
  return executable_home();
}

void admit_config_file(NodeConfig& config, const ServeArguments& arguments,
                       const Environment& environment, ParallelRequest& parallel,
                       Problems& problems, Problems& warnings) {
  std::string source = "--config-file";
  std::string path = arguments.config_file;
  if (path.empty()) {
    source = "environment variable MIES_CONFIG_JSON_PATH";
    path = variable(environment, "MIES_CONFIG_JSON_PATH");
  }
  const bool of_home = path.empty();
  if (of_home) {
    source = "the install directory";
    path = (fs::path(config.home) / "conf" / "config.json").string();
  }
  config.config_path = path;
  std::error_code error;
  if (!fs::exists(fs::symlink_status(path, error))) {
    problems.add({.what = "no configuration file",
                  .where = path,
                  .found = "nothing there",
                  .expected = fmt::format("config.json, named by {}", source),
                  .fix =
                      "write one with `phalanx config make`, name another with --config-file or "
                      "MIES_CONFIG_JSON_PATH, or start without files: phalanx serve --model DIR"});
    return;
  }
  if (of_home) {
    const fs::path real = fs::weakly_canonical(path, error);
    const fs::path home = fs::weakly_canonical(config.home, error);
    const auto [end, rest] = std::mismatch(home.begin(), home.end(), real.begin(), real.end());
    if (end != home.end())
      problems.add({.what = "the configuration file leads out of the install directory",
                    .where = path,
                    .found = real.string(),
                    .expected = fmt::format("a file under {}", home.string()),
                    .fix = "copy it there, or name it with MIES_CONFIG_JSON_PATH"});
  }
  const std::string text = read_guarded_file(path, FileRule{}, problems, warnings);
  if (!text.empty()) read_config_text(text, path, config, parallel, problems);
}

void check_listeners(const ServerConfig& server, const std::string& file, Problems& problems) {
  for (const auto& [key, address] :
       {std::pair{"ipAddress", server.ip_address},
        std::pair{"managementIpAddress", server.management_ip_address}})
    if (is_all_zero(address) && !server.allow_all_zero_ip)
      problems.add({.what = "listening on every address is not allowed",
                    .where = fmt::format("{}: ServerConfig.{}", file, key),
                    .found = address,
                    .expected = "one address of this machine",
                    .fix = "name the address, or set \"allowAllZeroIpListening\": true"});
  if (server.ip_address == server.management_ip_address && server.port == server.metrics_port &&
      server.port != server.management_port)
    problems.add({.what = "business and metrics share a port but management does not",
                  .where = fmt::format("{}: ServerConfig.port, managementPort, metricsPort", file),
                  .found = fmt::format("{}, {}, {} on {}", server.port, server.management_port,
                                       server.metrics_port, server.ip_address),
                  .expected = "three ports, one port for all, or one for management and metrics",
                  .fix = "choose another metricsPort"});
}

void override_address(const Environment& environment, const char* name, std::string& address,
                      Problems& problems) {
  const std::string value = variable(environment, name);
  if (value.empty()) return;
  if (!is_ip(value)) {
    problems.add({.what = "not an IP address",
                  .where = fmt::format("environment variable {}", name),
                  .found = fmt::format("\"{}\"", value),
                  .expected = "an address of this node in numbers",
                  .fix = fmt::format("e.g. {}=10.0.0.1", name)});
    return;
  }
  address = value;
}

// First IPv4 address of this machine's name; empty when there is none.
std::string address_of_hostname() {
  char name[HOST_NAME_MAX + 1] = {};
  if (::gethostname(name, HOST_NAME_MAX) != 0) return {};
  addrinfo hints{};
  hints.ai_family = AF_INET;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (::getaddrinfo(name, nullptr, &hints, &found) != 0 || found == nullptr) return {};
  char text[NI_MAXHOST] = {};
  const int status = ::getnameinfo(found->ai_addr, found->ai_addrlen, text, sizeof text, nullptr, 0,
                                   NI_NUMERICHOST);
  ::freeaddrinfo(found);
  return status == 0 ? text : std::string();
}

struct OwnAddresses {
  std::string container_ip;
  std::string host_ip;
};

OwnAddresses own_addresses(const Environment& environment, NodeConfig& config) {
  OwnAddresses own{variable(environment, "MIES_CONTAINER_IP"), variable(environment, "HOST_IP")};
  if (!own.host_ip.empty() && !is_ip(own.host_ip)) {
    config.warnings.push_back(
        fmt::format("environment variable HOST_IP: found \"{}\", expected an IP address; not used",
                    own.host_ip));
    own.host_ip.clear();
  }
  if (own.container_ip.empty() && own.host_ip.empty()) {
    own.container_ip = address_of_hostname();
    config.warnings.push_back(fmt::format(
        "neither MIES_CONTAINER_IP nor HOST_IP is set; taking the address of this machine's name: "
        "{}",
        own.container_ip.empty() ? "none found" : own.container_ip));
  }
  return own;
}

void add_error(const Error& error, Problems& problems) { problems.add({.what = error.what()}); }

void read_multi_node_table(const std::string& path, const Environment& environment,
                           NodeConfig& config, Problems& problems, Problems& warnings) {
  const size_t before = problems.list().size();
  if (path.empty()) {
    problems.add({.what = "multiNodesInferEnabled is true but no rank table is named",
                  .where = "environment variable RANK_TABLE_FILE",
                  .found = "unset",
                  .expected = "the path of ranktable.json, the same file on every node",
                  .fix = "export RANK_TABLE_FILE=/path/to/ranktable.json (`phalanx ranktable make` "
                         "writes one), or set \"multiNodesInferEnabled\": false"});
    return;
  }
  try {
    config.table = cluster::load_rank_table(path);
  } catch (const Error& error) {
    add_error(error, problems);
    return;
  }
  config.model.world_size = config.table.world_size;
  const OwnAddresses own = own_addresses(environment, config);
  try {
    config.own_server = cluster::find_own_server(config.table, own.container_ip, own.host_ip, path);
  } catch (const Error& error) {
    add_error(error, problems);
  }

  const InterNodeRequest request{
      .table = config.table,
      .own_server = config.own_server,
      .written = config.backend.inter_node_tls,
      .how_to_switch_off = fmt::format("\"interNodeTLSEnabled\": false in BackendConfig of {}",
                                       config.config_path),
      .data_plane = config.data_plane,
      .table_path = path,
      .home = config.home,
      .certs = config.certs};
  if (problems.list().size() == before)
    config.inter_node =
        load_inter_node_tls(request, config.backend.inter_node_keys, problems, warnings);
}

// The files of the HTTPS planes that lie below the install directory are taken from --certs instead.
void use_certs_folder(NodeConfig& config) {
  const std::string own = config.table.servers[static_cast<size_t>(config.own_server)].address();
  const std::string folder = security_home(config.home, config.certs, own);
  const std::string old = (fs::path(config.home) / "").string();
  const auto move = [&](std::string& path) {
    if (path.starts_with(old)) path = (fs::path(folder) / path.substr(old.size())).string();
  };
  ServerConfig& server = config.server;
  net::TlsFiles* planes[] = {&server.business_tls, &server.management_tls, &server.metrics_tls};
  for (size_t i = 0; i < std::size(planes); ++i) {
    net::TlsFiles& files = *planes[i];
    for (std::string* path : {&files.certificate, &files.key, &files.key_password,
                              &files.key_store.master, &files.key_store.standby})
      move(*path);
    for (std::string& path : files.authorities) move(path);
    for (std::string& path : files.crls) move(path);
    // A list at its default place is used though it is not named, as in the install directory.
    const fs::path list = fs::path(folder) / kPlanes[i + 1].revocations;
    if (files.crls.empty() && fs::exists(list)) files.crls.push_back(list.string());
  }
}

// One server with worldSize ranks; a set RANK_TABLE_FILE must agree with that.
void make_single_node_table(const std::string& path, NodeConfig& config, Problems& problems) {
  const std::string address =
      is_all_zero(config.server.ip_address) ? "127.0.0.1" : config.server.ip_address;
  cluster::Server server{.server_id = address, .container_ip = address};
  for (int rank = 0; rank < config.model.world_size && rank < kMostRanks; ++rank) {
    const auto& ids = config.backend.device_ids;
    const bool named = !ids.empty() && static_cast<size_t>(rank) < ids.front().size();
    server.devices.push_back({.device_id = named ? ids.front()[rank] : rank, .rank_id = rank});
  }
  config.table.world_size = static_cast<int>(server.devices.size());
  config.table.servers = {std::move(server)};
  if (path.empty()) return;

  cluster::RankTable table;
  try {
    table = cluster::load_rank_table(path);
  } catch (const Error& error) {
    add_error(error, problems);
    return;
  }
  const std::string where = fmt::format("environment variable RANK_TABLE_FILE ({})", path);
  if (table.servers.size() != 1) {
    problems.add({.what = "a single-node start with the rank table of several servers",
                  .where = where,
                  .found = fmt::format("{} servers", table.servers.size()),
                  .expected = "1 server, or the variable unset",
                  .fix = "unset RANK_TABLE_FILE, or set \"multiNodesInferEnabled\": true in "
                         "config.json"});
    return;
  }
  if (table.world_size != config.model.world_size) {
    problems.add({.what = "the rank table and worldSize disagree",
                  .where = where,
                  .found = fmt::format("{} ranks", table.world_size),
                  .expected = fmt::format("{} (worldSize)", config.model.world_size),
                  .fix = "correct worldSize or the table, or unset RANK_TABLE_FILE"});
    return;
  }
  config.table = std::move(table);
}

// moe_ep x moe_tp must be all ranks; without moe_ep, moe_tp alone.
void check_experts(const NodeConfig& config, const ParallelRequest& parallel, Problems& problems) {
  const int64_t ranks = config.model.world_size;
  const int64_t ep = parallel.moe_ep.value_or(1);
  const int64_t tp = parallel.moe_tp.value_or(ep > 0 && ranks % ep == 0 ? ranks / ep : 0);
  if (ep * tp == ranks) return;
  problems.add({.what = parallel.moe_ep ? "World size must equal to MoE's ep_size * MoE's tp_size"
                                        : "World size must equal to MoE's tp_size",
                .where = fmt::format("{}: BackendConfig.ModelDeployConfig.ModelConfig[0].{}",
                                     config.config_path, parallel.moe_ep ? "moe_ep" : "moe_tp"),
                .found = parallel.moe_tp ? fmt::format("moe_ep {} x moe_tp {}", ep, tp)
                                         : fmt::format("moe_ep {}", ep),
                .expected = fmt::format("a product of {}, the number of all ranks", ranks),
                .fix = "remove \"moe_ep\" and \"moe_tp\": every rank then computes its part of "
                       "every expert"});
}

void check_ranks(const NodeConfig& config, const ParallelRequest& parallel,
                 const WeightFacts& facts, const std::string& where, Problems& problems) {
  const int64_t ranks = config.model.world_size;
  if (parallel.tp && *parallel.tp != ranks)
    problems.add({.what = "tp is not the number of all ranks",
                  .where = fmt::format("{}: BackendConfig.ModelDeployConfig.ModelConfig[0].tp",
                                       config.config_path),
                  .found = std::to_string(*parallel.tp),
                  .expected = std::to_string(ranks),
                  .fix = fmt::format("remove \"tp\", or write \"tp\": {}", ranks)});
  check_experts(config, parallel, problems);
  const bool multi = config.backend.multi_nodes;
  const std::string source = multi ? "the rank table" : where;
  if (ranks > kMostRanks)
    problems.add({.what = "too many ranks",
                  .where = source,
                  .found = std::to_string(ranks),
                  .expected = fmt::format("at most {}", kMostRanks),
                  .fix = "use fewer ranks"});
  if (facts.query_heads && ranks > *facts.query_heads)
    problems.add({.what = "more ranks than query heads: some would have nothing to do",
                  .where = source,
                  .found = fmt::format("{} ranks", ranks),
                  .expected = fmt::format("at most {} (num_attention_heads of {}/config.json)",
                                          *facts.query_heads, config.model.weight_path),
                  .fix = fmt::format("use at most {} ranks for this model", *facts.query_heads)});
}

std::string name_from_directory(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  std::string name = fs::path(path).filename().string();
  std::replace_if(
      name.begin(), name.end(),
      [](unsigned char c) { return !std::isalnum(c) && c != '_' && c != '.' && c != '-'; }, '-');
  const auto outer = [](unsigned char c) { return std::isalnum(c) != 0; };
  name.erase(name.begin(), std::find_if(name.begin(), name.end(), outer));
  name.erase(std::find_if(name.rbegin(), name.rend(), outer).base(), name.end());
  return name.empty() ? "model" : name.substr(0, 64);
}

// `phalanx serve --model DIR`: one machine, one port for all three planes.
void read_arguments(const ServeArguments& arguments, NodeConfig& config, Problems& problems) {
  ServerConfig& server = config.server;
  server.https = false;
  if (!arguments.host.empty()) server.ip_address = arguments.host;
  if (!is_ip(server.ip_address))
    problems.add({.what = "not an IP address",
                  .where = "--host",
                  .found = server.ip_address,
                  .expected = "an address of this machine in numbers",
                  .fix = "e.g. --host 127.0.0.1"});
  server.management_ip_address = server.ip_address;
  server.allow_all_zero_ip = true;  // whoever types --host 0.0.0.0 means it
  if (arguments.port != 0) server.port = arguments.port;
  if (server.port < 1024 || server.port > 65535)
    problems.add({.what = "value out of range",
                  .where = "--port",
                  .found = std::to_string(arguments.port),
                  .expected = "a port in [1024, 65535]",
                  .fix = "e.g. --port 1025"});
  server.management_port = server.metrics_port = server.port;
  if (arguments.tp < 0)
    problems.add({.what = "value out of range",
                  .where = "--tp",
                  .found = std::to_string(arguments.tp),
                  .expected = "a number of ranks, at least 1",
                  .fix = "e.g. --tp 2"});
  config.model.world_size = std::max(1, arguments.tp);
  config.model.weight_path = arguments.model;
  config.model.name = arguments.served_model_name.value_or(name_from_directory(arguments.model));
  if (!is_model_name(config.model.name))
    problems.add({.what = "not a model name",
                  .where = "--served-model-name",
                  .found = fmt::format("\"{}\"", config.model.name),
                  .expected = "1 to 256 of letters, digits, '_', '.', '-', the first and the last "
                              "a letter or digit",
                  .fix = "choose such a name"});
}

void size_by_model(const WeightFacts& facts, NodeConfig& config) {
  ModelConfig& model = config.model;
  if (facts.max_positions)
    model.max_sequence = std::min(*facts.max_positions, kLongestContextWithoutFile);
  model.max_input_tokens = std::max<int64_t>(1, model.max_sequence - 1);
  config.schedule.max_output_tokens = kLongestOutputWithoutFile;
}

// The directory of the draft model, on the node that runs it, held to the same rules as the model's.
void admit_draft_model(const Environment& environment, NodeConfig& config, Problems& problems,
                       Problems& warnings) {
  PluginConfig& plugins = config.plugins;
  const bool from_file = plugins.draft_where.find("plugin_params") != std::string::npos;
  if (from_file && !plugins.draft_model.empty() && plugins.draft_model.front() != '/')
    plugins.draft_model = (fs::path(config.home) / plugins.draft_model).string();
  if (!runs_draft_model(config)) return;
  (void)check_weight_directory(
      plugins.draft_model, plugins.draft_where,
      {.strict = from_file,
       .check_modes = variable(environment, "MINDIE_CHECK_INPUTFILES_PERMISSION") != "0",
       .max_json_depth = config.server.max_json_depth},
      problems, warnings);
}

std::string fingerprint(const std::vector<std::pair<std::string, std::string>>& settings) {
  std::string text;
  for (const auto& [name, value] : settings) text += fmt::format("{}={}\n", name, value);
  return net::sha256_hex(text);
}

}  // namespace

std::vector<std::pair<std::string, std::string>> shared_settings(const NodeConfig& config) {
  const ModelConfig& model = config.model;
  const ScheduleConfig& schedule = config.schedule;
  std::string modules;
  for (const LoraModule& module : model.lora_modules)
    modules += fmt::format("{}{}={}", modules.empty() ? "" : ", ", module.name, module.path);
  return {
      {"modelName", model.name},
      {"maxSeqLen", std::to_string(model.max_sequence)},
      {"maxInputTokenLen", std::to_string(model.max_input_tokens)},
      {"truncation", std::to_string(model.truncation)},
      {"npuMemSize", std::to_string(model.npu_mem_gb)},
      {"kvCacheDtype", std::string(models::kv_dtype_name(model.kv))},
      {"moe_ep", std::to_string(model.moe_ep)},
      {"maxLoras", std::to_string(model.max_loras)},
      {"maxLoraRank", std::to_string(model.max_lora_rank)},
      {"LoraModules", modules},
      {"cacheBlockSize", std::to_string(schedule.cache_block_size)},
      {"maxPrefillBatchSize", std::to_string(schedule.max_prefill_batch)},
      {"maxPrefillTokens", std::to_string(schedule.max_prefill_tokens)},
      {"maxBatchSize", std::to_string(schedule.max_batch)},
      {"maxIterTimes", std::to_string(schedule.max_output_tokens)},
      {"maxPreemptCount", std::to_string(schedule.max_preempt_count)},
      {"multiNodesInferEnabled", config.backend.multi_nodes ? "true" : "false"},
      {"multiNodesInferPort", std::to_string(config.backend.multi_nodes_port)},
      {"tensors between nodes",
       config.inter_node.transport == comm::Transport::kUcx ? "over UCX" : "over TCP"},
  };
}

NodeConfig load_node_config(const ServeArguments& arguments, const Environment& environment) {
  Problems problems;
  Problems warnings;
  NodeConfig config = examine_node_config(arguments, environment, problems, warnings);
  problems.throw_if_any("cannot start with this configuration");
  for (const Problem& warning : warnings.list())
    config.warnings.push_back(phalanx::to_string(warning));
  return config;
}

NodeConfig examine_node_config(const ServeArguments& arguments, const Environment& environment,
                               Problems& problems, Problems& warnings) {
  NodeConfig config;
  config.home = find_home(environment);
  config.certs = arguments.certs;
  ParallelRequest parallel;
  const bool from_file = arguments.model.empty();
  config.model.aliases = arguments.aliases;
  if (!arguments.speculative_config.empty())
    read_speculative_config(arguments.speculative_config, problems, config.ignored, config.plugins);
  read_draft_options(arguments.draft_model, arguments.draft_tokens, problems, config.plugins);
  if (from_file) {
    // modelName stays the first name; the command line adds others.
    if (arguments.served_model_name)
      config.model.aliases.insert(config.model.aliases.begin(), *arguments.served_model_name);
    for (const auto& [option, given] :
         {std::pair{"--tp", arguments.tp != 0}, std::pair{"--host", !arguments.host.empty()},
          std::pair{"--port", arguments.port != 0},
          std::pair{"--ssl-certfile", !arguments.ssl_certfile.empty()},
          std::pair{"--ssl-keyfile", !arguments.ssl_keyfile.empty()},
          std::pair{"--ssl-ca-certs", !arguments.ssl_ca_certs.empty()}})
      if (given)
        problems.add({.what = "option without --model",
                      .where = option,
                      .expected = "these settings in config.json",
                      .fix = "set them there, or start with --model DIR"});
    admit_config_file(config, arguments, environment, parallel, problems, warnings);
    override_address(environment, "MIES_CONTAINER_IP", config.server.ip_address, problems);
    override_address(environment, "MIES_CONTAINER_MANAGEMENT_IP",
                     config.server.management_ip_address, problems);
  } else {
    if (!arguments.config_file.empty())
      problems.add({.what = "two sources of settings",
                    .where = "--model and --config-file",
                    .expected = "one of them",
                    .fix = "leave one away"});
    read_arguments(arguments, config, problems);
  }
  // A file that could not be read at all has said what is wrong: nothing below would be meant.
  if (from_file && config.model.weight_path.empty() && !problems.empty()) return config;

  read_front(arguments, environment, config, problems, warnings);
  check_listeners(config.server, config.config_path, problems);
  read_environment(environment, config, problems);

  if (from_file && !config.model.weight_path.empty() && config.model.weight_path.front() != '/')
    config.model.weight_path = (fs::path(config.home) / config.model.weight_path).string();
  const std::string weights_where =
      from_file ? fmt::format("{}: BackendConfig.ModelDeployConfig.ModelConfig[0].modelWeightPath",
                              config.config_path)
                : "--model";
  const WeightFacts facts = check_weight_directory(
      config.model.weight_path, weights_where,
      {.strict = from_file,
       .check_modes = variable(environment, "MINDIE_CHECK_INPUTFILES_PERMISSION") != "0",
       .max_json_depth = config.server.max_json_depth},
      problems, warnings);
  if (!from_file) size_by_model(facts, config);
  read_adapter_arguments(arguments, config.model, problems);
  complete_adapters(config.model,
                    from_file && variable(environment, "MINDIE_CHECK_INPUTFILES_PERMISSION") != "0",
                    problems);

  const std::string table_path = rank_table_path(environment, config);
  if (config.backend.multi_nodes)
    read_multi_node_table(table_path, environment, config, problems, warnings);
  else
    make_single_node_table(table_path, config, problems);
  if (!config.certs.empty() && !config.table.servers.empty()) use_certs_folder(config);
  check_ranks(config, parallel, facts,
              from_file ? fmt::format("{}: BackendConfig.ModelDeployConfig.ModelConfig[0]"
                                      ".worldSize",
                                      config.config_path)
                        : "--tp",
              problems);
  admit_draft_model(environment, config, problems, warnings);
  config.model.moe_ep = parallel.moe_ep.value_or(1);
  config.model.kv = arguments.kv.value_or(config.model.kv);

  config.model.max_input_tokens =
      std::min(config.model.max_input_tokens, std::max<int64_t>(1, config.model.max_sequence - 1));
  for (const std::string& note : config.table.notes) config.warnings.push_back(note);
  config.digest = fingerprint(shared_settings(config));
  return config;
}

}  // namespace phalanx::apps
