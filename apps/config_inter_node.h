#pragma once

// TLS between nodes: interNodeTLS… of config.json, PHALANX_DATA_PLANE, --certs.

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "apps/config_section.h"
#include "phalanx/cluster/rank_table.h"
#include "phalanx/comm/bootstrap.h"
#include "phalanx/net/tls_material.h"

namespace phalanx::apps {

// The keys as written or by their defaults; paths relative to the security home.
struct InterNodeKeys {
  std::string authority_path = "security/grpc/ca/";
  std::vector<std::string> authority_files = {"ca.pem"};
  std::string certificate = "security/grpc/certs/server.pem";
  std::string key = "security/grpc/keys/server.key.pem";
  std::string key_password = "security/grpc/pass/mindie_server_key_pwd.txt";
  std::string crl_path = "security/grpc/certs/";
  std::vector<std::string> crl_files = {"server_crl.pem"};
  std::string key_store = "tools/pmt/master/ksfa";
  std::string key_store_copy = "tools/pmt/standby/ksfb";
};

// Reads and type-checks the keys of BackendConfig.
void read_inter_node_keys(ConfigSection& section, InterNodeKeys& keys);

struct InterNodeTls {
  std::shared_ptr<const net::TlsMaterial> material;  // null: in the clear
  bool data_plane = false;                           // data ports too
  comm::Transport transport = comm::Transport::kTcp;  // of tensors; over UCX they are in clear
};

struct InterNodeRequest {
  const cluster::RankTable& table;
  int own_server = 0;
  std::optional<bool> written;    // interNodeTLSEnabled, or --inter-node-tls
  std::string how_to_switch_off;  // the words that do so, for messages
  std::string data_plane;         // PHALANX_DATA_PLANE; empty: not set
  std::string table_path;         // for messages
  std::string home;               // base of relative paths
  std::string certs;              // --certs: a folder of `phalanx certs init`, or of one node; or empty
};

// Decides whether TLS is on (as written; else on unless every address is a loopback one), then loads
// and checks the files of this node.
[[nodiscard]] InterNodeTls load_inter_node_tls(const InterNodeRequest& request,
                                               const InterNodeKeys& keys, Problems& problems,
                                               Problems& warnings);

// The folder below which this node's security/ and tools/ lie: `certs`/<own address> if it exists,
// else `certs`, else `home`.
[[nodiscard]] std::string security_home(const std::string& home, const std::string& certs,
                                        const std::string& own_address);

}  // namespace phalanx::apps
