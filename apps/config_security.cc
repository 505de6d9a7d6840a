#include "apps/config_security.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "apps/config_environment.h"
#include "phalanx/api/http_message.h"
#include "phalanx/base/guarded_file.h"
#include "phalanx/base/json.h"
#include "phalanx/net/address.h"
#include "phalanx/net/digest.h"

namespace phalanx::apps {
namespace {

namespace fs = std::filesystem;

constexpr size_t kLongestPath = 4096;
constexpr int64_t kLargestKeyFile = 64 << 10;
constexpr size_t kShortestApiKey = 8;

std::string complete(const std::string& home, const std::string& path) {
  return path.empty() ? path : (fs::path(home) / path).string();
}

std::string read_path(ConfigSection& section, std::string_view key, Need need, std::string fallback) {
  std::string path = std::move(fallback);
  if (section.string(key, need, path) && path.size() > kLongestPath)
    section.problem(key, "path too long", fmt::format("{} bytes", path.size()),
                    fmt::format("at most {} bytes", kLongestPath), "use a shorter path");
  return path;
}

void add_key(const std::string& key, const std::string& where, NodeConfig& config,
             Problems& problems) {
  if (key.size() < kShortestApiKey ||
      std::any_of(key.begin(), key.end(), [](char c) { return c <= ' ' || c >= 0x7f; })) {
    problems.add({.what = "not an API key",
                  .where = where,
                  .found = fmt::format("{} bytes (not shown)", key.size()),
                  .expected = fmt::format("at least {} visible ASCII characters without blanks",
                                          kShortestApiKey),
                  .fix = "e.g. openssl rand -hex 24"});
    return;
  }
  config.server.key_digests.push_back(net::sha256_hex(key));
}

// Plain values, or JSON lists as vLLM takes them: '["*"]'.
std::vector<std::string> listed(const std::vector<std::string>& values, const char* option,
                                Problems& problems) {
  std::vector<std::string> list;
  for (const std::string& value : values) {
    if (!value.starts_with('[')) {
      list.push_back(value);
      continue;
    }
    try {
      for (const auto& item : parse_json(value, option, 2)) list.push_back(item.get<std::string>());
    } catch (const std::exception& error) {
      problems.add({.what = "not a list of texts",
                    .where = option,
                    .found = value,
                    .expected = "names, or a JSON list of names",
                    .fix = fmt::format("e.g. {} '[\"*\"]'", option)});
    }
  }
  return list;
}

}  // namespace

void read_tls_files(ConfigSection& section, const TlsKeys& keys, Need need, const std::string& home,
                    net::TlsFiles& files) {
  files.plane = keys.plane;
  const std::string folder = complete(home, read_path(section, keys.ca_path, need, "security/ca/"));
  std::vector<std::string> names = {keys.default_ca};
  section.strings(keys.ca_files, need, 1, 3, names);
  files.authorities.clear();
  for (const std::string& name : names) {
    const std::string path = (fs::path(folder) / name).string();
    if (std::find(files.authorities.begin(), files.authorities.end(), path) == files.authorities.end())
      files.authorities.push_back(path);
  }
  files.certificate = complete(
      home, read_path(section, keys.certificate, need, keys.default_certificate));
  files.key = complete(home, read_path(section, keys.key, need, keys.default_key));
  files.key_password = complete(
      home, read_path(section, keys.password, Need::kOptional, keys.default_password));
  files.key_store = {
      complete(home, read_path(section, keys.store, Need::kOptional, "tools/pmt/master/ksfa")),
      complete(home, read_path(section, keys.standby, Need::kOptional, "tools/pmt/standby/ksfb"))};
  const std::string crl_folder = read_path(section, keys.crl_path, Need::kOptional, keys.default_crl_path);
  names = {"server_crl.pem"};
  const bool named = section.strings(keys.crl_files, Need::kOptional, 0, 3, names);
  files.crls.clear();
  if (crl_folder.empty()) return;
  for (const std::string& name : names) {
    std::string path = (fs::path(complete(home, crl_folder)) / name).string();
    std::error_code error;
    if (named || fs::exists(path, error)) files.crls.push_back(std::move(path));
  }
}

void read_plane_tls(ConfigSection& section, const std::string& home, ServerConfig& server) {
  const TlsKeys business{.plane = "business",
                         .ca_files = "tlsCaFile",
                         .certificate = "tlsCert",
                         .key = "tlsPk",
                         .password = "tlsPkPwd",
                         .crl_path = "tlsCrlPath",
                         .crl_files = "tlsCrlFiles",
                         .default_ca = "ca.pem",
                         .default_certificate = "security/certs/server.pem",
                         .default_key = "security/keys/server.key.pem",
                         .default_password = "security/pass/key_pwd.txt",
                         .default_crl_path = "security/certs/"};
  read_tls_files(section, business, server.https ? Need::kMandatory : Need::kOptional, home,
                 server.business_tls);
  const auto other = [&](const std::string& plane, net::TlsFiles& files) {
    const TlsKeys keys{.plane = plane,
                       .ca_files = plane + "TlsCaFile",
                       .certificate = plane + "TlsCert",
                       .key = plane + "TlsPk",
                       .password = plane + "TlsPkPwd",
                       .crl_path = plane + "TlsCrlPath",
                       .crl_files = plane + "TlsCrlFiles",
                       .default_ca = plane + "_ca.pem",
                       .default_certificate = fmt::format("security/certs/{}/server.pem", plane),
                       .default_key = fmt::format("security/keys/{}/server.key.pem", plane),
                       .default_password = fmt::format("security/pass/{}/key_pwd.txt", plane),
                       .default_crl_path = fmt::format("security/{}/certs/", plane)};
    read_tls_files(section, keys, Need::kOptional, home, files);
  };
  other("management", server.management_tls);
  other("metrics", server.metrics_tls);
}

void read_front(const ServeArguments& arguments, const Environment& environment, NodeConfig& config,
                Problems& problems, Problems& warnings) {
  ServerConfig& server = config.server;
  for (const std::string& key : arguments.api_keys) add_key(key, "--api-key", config, problems);
  for (const char* name : {"PHALANX_API_KEY", "VLLM_API_KEY"})
    if (const std::string key = variable(environment, name); !key.empty())
      add_key(key, fmt::format("environment variable {}", name), config, problems);
  if (!arguments.api_key_file.empty()) {
    std::istringstream lines(read_guarded_file(
        arguments.api_key_file,
        {.max_mode = 0600, .max_bytes = kLargestKeyFile, .check_switch_applies = false}, problems,
        warnings));
    int number = 0;
    for (std::string line; std::getline(lines, line);) {
      ++number;
      if (!line.empty() && line.back() == '\r') line.pop_back();
      if (line.empty() || line.front() == '#') continue;
      add_key(line, fmt::format("{}:{}", arguments.api_key_file, number), config, problems);
    }
  }
  server.cors_origins = listed(arguments.allowed_origins, "--allowed-origins", problems);
  if (!arguments.allowed_methods.empty())
    server.cors_methods = listed(arguments.allowed_methods, "--allowed-methods", problems);
  if (!arguments.allowed_headers.empty())
    server.cors_headers = listed(arguments.allowed_headers, "--allowed-headers", problems);
  server.cors_credentials = arguments.allow_credentials;

  if (!arguments.ssl_certfile.empty() || !arguments.ssl_keyfile.empty()) {
    if (arguments.ssl_certfile.empty() || arguments.ssl_keyfile.empty())
      problems.add({.what = "half of a certificate and key",
                    .where = "--ssl-certfile and --ssl-keyfile",
                    .expected = "both",
                    .fix = "name the other one too"});
    server.https = true;
    server.client_certificates = !arguments.ssl_ca_certs.empty();
    server.business_tls = {.plane = "business",
                           .certificate = arguments.ssl_certfile,
                           .key = arguments.ssl_keyfile};
    if (server.client_certificates) server.business_tls.authorities = {arguments.ssl_ca_certs};
    server.management_tls = server.metrics_tls = server.business_tls;
  }
  if (!arguments.https_client_auth.empty())
    server.client_certificates = arguments.https_client_auth == "required";
  if (server.https && !server.client_certificates && server.key_digests.empty())
    problems.add({.what = "neither client certificates nor API keys: anybody could ask",
                  .where = arguments.ssl_certfile.empty() ? "--https-client-auth=none"
                                                          : "--ssl-certfile without --ssl-ca-certs",
                  .expected = "client certificates, or API keys",
                  .fix = "add --api-key-file FILE, or leave client certificates on"});
  if (!server.https) {
    for (const auto& [key, address] : {std::pair{"ipAddress", server.ip_address},
                                       std::pair{"managementIpAddress", server.management_ip_address}}) {
      const auto parsed = net::Address::parse(address);
      if (parsed && !parsed->is_loopback()) {
        config.warnings.push_back(fmt::format(
            "HTTP without TLS on {} ({}): prompts, answers{} can be read and changed by the network; "
            "set \"httpsEnabled\": true (phalanx certs init makes the certificates)",
            address, key, server.key_digests.empty() ? "" : ", API keys"));
        break;
      }
    }
  }
}

std::vector<PlaneListener> plane_listeners(const ServerConfig& s) {
  struct Place {
    std::string address;
    int port;
    unsigned plane;
    const net::TlsFiles* tls;
  };
  std::vector<PlaneListener> listeners;
  for (const Place& place :
       {Place{s.ip_address, s.port, api::kBusiness, &s.business_tls},
        Place{s.management_ip_address, s.management_port, api::kManagement, &s.management_tls},
        Place{s.management_ip_address, s.metrics_port, api::kMetrics, &s.metrics_tls}}) {
    const auto same = std::find_if(listeners.begin(), listeners.end(), [&](const auto& l) {
      return net::same_address(l.address, place.address) && l.port == place.port;
    });
    if (same != listeners.end())
      same->planes |= place.plane;
    else
      listeners.push_back(
          {place.address, place.port, place.plane, s.https ? place.tls : nullptr});
  }
  return listeners;
}

}  // namespace phalanx::apps
