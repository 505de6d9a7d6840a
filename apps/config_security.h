#pragma once

// The security keys of config.json: certificates of the HTTPS planes (config-json.md §4.3), and who
// may ask over HTTP.

#include <string>

#include "apps/config.h"
#include "apps/config_section.h"

namespace phalanx::apps {

// Names of one plane's TLS keys, and what they are when absent.
struct TlsKeys {
  std::string plane;  // for messages
  std::string ca_path = "tlsCaPath", ca_files, certificate, key, password, crl_path, crl_files;
  std::string default_ca, default_certificate, default_key, default_password, default_crl_path;
  std::string store = "kmcKsfMaster", standby = "kmcKsfStandby";
};

// Reads them; paths are completed with `home`. A revocation list that is not named is used if it
// lies at its default place.
void read_tls_files(ConfigSection& section, const TlsKeys& keys, Need need, const std::string& home,
                    net::TlsFiles& files);
// All three planes of ServerConfig.
void read_plane_tls(ConfigSection& section, const std::string& home, ServerConfig& server);

// What the command line and the environment say: --ssl-*, --api-key*, --allowed-*; PHALANX_API_KEY.
void read_front(const ServeArguments& arguments, const Environment& environment, NodeConfig& config,
                Problems& problems, Problems& warnings);

// A listener of the HTTP side: merged planes share one.
struct PlaneListener {
  std::string address;
  int port = 0;
  unsigned planes = 0;  // api::Plane
  const net::TlsFiles* tls = nullptr;  // null: plain HTTP
};
// Which plane listens where (config-json.md §4.2; row 5 differs on purpose: the management routes
// stay on the management address). The first plane of a merged listener lends its certificate.
[[nodiscard]] std::vector<PlaneListener> plane_listeners(const ServerConfig& server);

}  // namespace phalanx::apps
