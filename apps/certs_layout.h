#pragma once

// Where the files of each plane lie below a node's install directory: the defaults of the guide's
// tables (startup-security.md §4.2), so that what `phalanx certs` writes needs no key in
// config.json.

#include <array>
#include <string>
#include <string_view>

namespace phalanx::apps {

struct PlaneLayout {
  std::string_view name;      // "inter-node"
  std::string_view authority;
  std::string_view certificate;
  std::string_view key;
  std::string_view password;
  std::string_view revocations;
  bool client = false;        // its certificate is also shown to other servers
};

inline constexpr auto kPlanes = std::to_array<PlaneLayout>({
    {"inter-node", "security/grpc/ca/ca.pem", "security/grpc/certs/server.pem",
     "security/grpc/keys/server.key.pem", "security/grpc/pass/mindie_server_key_pwd.txt",
     "security/grpc/certs/server_crl.pem", true},
    {"service", "security/ca/ca.pem", "security/certs/server.pem", "security/keys/server.key.pem",
     "security/pass/key_pwd.txt", "security/certs/server_crl.pem"},
    {"management", "security/ca/management_ca.pem", "security/certs/management/server.pem",
     "security/keys/management/server.key.pem", "security/pass/management/key_pwd.txt",
     "security/management/certs/server_crl.pem"},
    {"metrics", "security/ca/metrics_ca.pem", "security/certs/metrics/server.pem",
     "security/keys/metrics/server.key.pem", "security/pass/metrics/key_pwd.txt",
     "security/metrics/certs/server_crl.pem"},
});
inline constexpr std::string_view kKeyStore = "tools/pmt/master/ksfa";
inline constexpr std::string_view kKeyStoreCopy = "tools/pmt/standby/ksfb";

// Below the folder that `phalanx certs init` fills: one folder per node, named by its address, and
// these two.
inline constexpr std::string_view kAuthorityFolder = "authority";
inline constexpr std::string_view kClientFolder = "client";

}  // namespace phalanx::apps
