#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "phalanx/cluster/rank_table.h"
#include "phalanx/net/tls_material.h"

namespace grpc {
class ChannelCredentials;
class ServerCredentials;
}  // namespace grpc

namespace phalanx::cluster {

// Who may speak on the control plane, as one node sees it. Without `tls` everybody, in the clear.
struct ControlSecurity {
  std::shared_ptr<const net::TlsMaterial> tls;
  RankTable table;
  int own_server = 0;
  std::function<std::shared_ptr<const net::TlsMaterial>()> renewed;  // what `tls` is by now; or empty

  [[nodiscard]] std::shared_ptr<const net::TlsMaterial> current() const {
    return tls != nullptr && renewed ? renewed() : tls;
  }
};

inline constexpr std::string_view kMasterRole = "inter-node:master";
inline constexpr std::string_view kSlaveRole = "inter-node:slave";

// The role of the node at `address`. (One process per rank makes several entries of one address.)
[[nodiscard]] std::string role_of(const RankTable& table, const std::string& address);

// Why a slave with this certificate is not let in by the master, or nothing: it must be of a slave
// of the rank table. `server`: the entry it claims to be, -1 while it has not said.
[[nodiscard]] std::optional<Problem> slave_problem(const net::CertificateInfo& info,
                                                        const RankTable& table, int server);
// Why a slave does not believe that this is its master.
[[nodiscard]] std::optional<Problem> master_problem(const net::CertificateInfo& info,
                                                         const RankTable& table);
// What a node's own certificate must be, for TlsMaterial::load().
[[nodiscard]] net::TlsNeeds node_needs(const RankTable& table, int own_server);

// This side's latest refusal of a peer during a handshake. Thread-safe.
class RefusalNote {
 public:
  void set(const std::string& sentence) {
    const std::lock_guard lock(mutex_);
    sentence_ = sentence;
  }
  [[nodiscard]] std::string get() const {
    const std::lock_guard lock(mutex_);
    return sentence_;
  }

 private:
  mutable std::mutex mutex_;
  std::string sentence_;  // guarded by mutex_
};

// How the two ends of the control plane prove themselves: mutual TLS 1.3, each side's certificate
// judged by net::PeerVerifier (revocation lists as they are on disk at that moment) and against the
// rank table, before a byte of HTTP/2 is parsed. Refusals are logged, a bounded number of them. The
// server's follow ControlSecurity::current(); a channel's are those of the moment it is made.
[[nodiscard]] std::shared_ptr<grpc::ServerCredentials> server_credentials(
    const ControlSecurity& security);
[[nodiscard]] std::shared_ptr<grpc::ChannelCredentials> channel_credentials(
    const ControlSecurity& security, std::shared_ptr<RefusalNote> note);

}  // namespace phalanx::cluster
