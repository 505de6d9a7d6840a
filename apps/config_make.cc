#include "apps/config_make.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>

#include "phalanx/base/error.h"
#include "phalanx/base/json.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/net/address.h"

namespace phalanx::apps {
namespace {

using nlohmann::ordered_json;

ordered_json tls_of_plane(const std::string& prefix, const std::string& folder) {
  return {{prefix + "TlsCaFile", {prefix + "_ca.pem"}},
          {prefix + "TlsCert", fmt::format("security/certs/{}/server.pem", folder)},
          {prefix + "TlsPk", fmt::format("security/keys/{}/server.key.pem", folder)},
          {prefix + "TlsCrlPath", fmt::format("security/{}/certs/", folder)},
          {prefix + "TlsCrlFiles", {"server_crl.pem"}}};
}

// Clear text must not leave the machine unless somebody wrote so.
bool is_loopback(const std::string& text) {
  const auto address = net::Address::parse(text);
  return !address || address->is_loopback();
}

ordered_json server_section(const ConfigMakeOptions& options) {
  ordered_json server = {
      {"ipAddress", options.ip},
      {"managementIpAddress", options.management_ip.empty() ? options.ip : options.management_ip},
      {"port", options.port},
      {"managementPort", options.management_port},
      {"metricsPort", options.metrics_port},
      {"allowAllZeroIpListening", false},
      {"maxLinkNum", 1000},
      {"maxRequestLength", 40},
      {"maxJsonDepth", 10},
      {"openAiSupport", "vllm"},
      {"tokenTimeout", 600},
      {"e2eTimeout", 600},
      {"inferMode", "standard"},
      {"httpsEnabled", !is_loopback(options.ip)},
      {"tlsCaPath", "security/ca/"},
      {"tlsCaFile", {"ca.pem"}},
      {"tlsCert", "security/certs/server.pem"},
      {"tlsPk", "security/keys/server.key.pem"},
      {"tlsCrlPath", "security/certs/"},
      {"tlsCrlFiles", {"server_crl.pem"}},
  };
  server.update(tls_of_plane("management", "management"));
  server.update(tls_of_plane("metrics", "metrics"));
  return server;
}

ordered_json schedule_section() {
  return {{"templateType", "Standard"},
          {"templateName", "Standard_LLM"},
          {"cacheBlockSize", 128},
          {"maxPrefillBatchSize", 50},
          {"maxPrefillTokens", 8192},
          {"prefillTimeMsPerReq", 150},
          {"prefillPolicyType", 0},
          {"decodeTimeMsPerReq", 50},
          {"decodePolicyType", 0},
          {"maxBatchSize", 200},
          {"maxIterTimes", 512},
          {"maxPreemptCount", 0},
          {"supportSelectBatch", false},
          {"maxQueueDelayMicroseconds", 5000},
          {"maxN", 128}};
}

ordered_json backend_section(const ConfigMakeOptions& options) {
  ordered_json ids = ordered_json::array();
  for (int i = 0; i < options.world_size; ++i) ids.push_back(i);
  const ordered_json model = {{"modelInstanceType", "Standard"},
                              {"modelName", options.name},
                              {"modelWeightPath", options.model},
                              {"worldSize", options.world_size},
                              {"cpuMemSize", 0},
                              {"npuMemSize", -1},
                              {"backendType", "atb"},
                              {"trustRemoteCode", false}};
  return {{"backendName", "mindieservice_llm_engine"},
          {"modelInstanceNumber", 1},
          {"npuDeviceIds", ordered_json::array({ids})},
          {"tokenizerProcessNumber", 8},
          {"multiNodesInferEnabled", options.multi_node},
          {"multiNodesInferPort", options.multi_node_port},
          {"interNodeTlsCaPath", "security/grpc/ca/"},
          {"interNodeTlsCaFiles", {"ca.pem"}},
          {"interNodeTlsCert", "security/grpc/certs/server.pem"},
          {"interNodeTlsPk", "security/grpc/keys/server.key.pem"},
          {"interNodeTlsCrlPath", "security/grpc/certs/"},
          {"interNodeTlsCrlFiles", {"server_crl.pem"}},
          {"ModelDeployConfig",
           {{"maxSeqLen", 2560},
            {"maxInputTokenLen", 2048},
            {"truncation", 0},
            {"ModelConfig", ordered_json::array({model})}}},
          {"ScheduleConfig", schedule_section()}};
}

// "A.B[0].c=value": value is JSON, or else taken as a string.
void apply(ordered_json& root, const std::string& assignment) {
  const size_t equals = assignment.find('=');
  if (equals == std::string::npos || equals == 0)
    throw Error(Code::kInvalidArgument,
                fmt::format("--set: found \"{}\", expected KEY.PATH=VALUE, e.g. "
                            "BackendConfig.ScheduleConfig.maxBatchSize=32",
                            assignment));
  std::string pointer = "/";
  for (const char c : assignment.substr(0, equals)) {
    if (c == '.' || c == '[')
      pointer += '/';
    else if (c != ']')
      pointer += c;
  }
  const std::string text = assignment.substr(equals + 1);
  ordered_json value;
  try {
    value = ordered_json::parse(text);
  } catch (const ordered_json::parse_error&) {
    value = text;
  }
  try {
    root[ordered_json::json_pointer(pointer)] = std::move(value);
  } catch (const ordered_json::exception& error) {
    throw Error(Code::kInvalidArgument, fmt::format("--set {}: no such place in config.json: {}",
                                                    assignment, error.what()));
  }
}

void write_file(const std::string& path, const std::string& text, bool force) {
  const int flags = O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW | (force ? O_TRUNC : O_EXCL);
  UniqueFd fd(::open(path.c_str(), flags, 0640));
  if (!fd.valid())
    throw Error(Code::kInvalidArgument,
                errno == EEXIST
                    ? fmt::format("{} exists. Fix: give another --output, or --force", path)
                    : fmt::format("cannot write {}: {}", path, std::strerror(errno)));
  std::string_view rest = text;
  while (!rest.empty()) {
    const ssize_t n = ::write(fd.get(), rest.data(), rest.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0)
      throw Error(Code::kUnavailable,
                  fmt::format("cannot write {}: {}", path, std::strerror(errno)));
    rest.remove_prefix(static_cast<size_t>(n));
  }
}

}  // namespace

std::string make_config_json(const ConfigMakeOptions& options) {
  ordered_json root = {{"Version", "1.0.0"},
                       {"ServerConfig", server_section(options)},
                       {"BackendConfig", backend_section(options)}};
  for (const std::string& assignment : options.set) apply(root, assignment);
  return root.dump(4) + "\n";
}

int config_main(int argc, char** argv) {
  ConfigMakeOptions options;
  std::string output = "-";
  bool force = false;
  CLI::App app{"Writes a config.json with every key that has an effect, at its default.",
               "phalanx config"};
  app.require_subcommand(1);
  CLI::App* make = app.add_subcommand("make", "write a config.json");
  make->add_option("--model", options.model, "weight directory (modelWeightPath)")->required();
  make->add_option("--name", options.name, "name that clients send (modelName)");
  make->add_flag("--multi-node", options.multi_node, "nodes and ranks come from the rank table");
  make->add_option("--world-size", options.world_size, "ranks of a single node")
      ->check(CLI::Range(1, 512));
  make->add_option("--ip", options.ip, "business address (ipAddress)");
  make->add_option("--management-ip", options.management_ip, "default: as --ip");
  make->add_option("--port", options.port, "business port");
  make->add_option("--management-port", options.management_port, "management port");
  make->add_option("--metrics-port", options.metrics_port, "metrics port");
  make->add_option("--multi-node-port", options.multi_node_port, "port between nodes");
  make->add_option("--set", options.set,
                   "any key, e.g. BackendConfig.ScheduleConfig.maxBatchSize=32")
      ->expected(1)
      ->take_all();
  make->add_option("-o,--output", output, "file to write; - is standard output");
  make->add_flag("--force", force, "replace an existing file");
  CLI11_PARSE(app, argc, argv);
  try {
    const std::string text = make_config_json(options);
    if (output == "-")
      fmt::print("{}", text);
    else
      write_file(output, text, force);
    return 0;
  } catch (const Error& error) {
    fmt::print(stderr, "phalanx: {}\n", error.what());
    return 1;
  }
}

}  // namespace phalanx::apps
