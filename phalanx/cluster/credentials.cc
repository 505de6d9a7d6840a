#include "phalanx/cluster/credentials.h"

#include <fmt/format.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_certificate_verifier.h>
#include <grpcpp/security/tls_credentials_options.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "phalanx/base/log.h"
#include "phalanx/base/log_limit.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/net/address.h"

namespace phalanx::cluster {
namespace {

using Judge = std::function<std::string(const net::CertificateInfo&)>;
using Told = std::function<void(const std::string&)>;
using Current = std::function<std::shared_ptr<const net::TlsMaterial>()>;

// gRPC hands over the peer's chain after the handshake has proved that it owns the key, and parses
// nothing of the peer's before this has answered.
class Verifier final : public grpc::experimental::ExternalCertificateVerifier {
 public:
  Verifier(Current current, net::Usage usage, Judge judge, Told told)
      : current_(std::move(current)),
        usage_(usage),
        judge_(std::move(judge)),
        told_(std::move(told)) {}

  bool Verify(grpc::experimental::TlsCustomVerificationCheckRequest* request,
              std::function<void(grpc::Status)>, grpc::Status* status) override {
    const grpc::string_ref chain = request->peer_cert_full_chain();
    const grpc::string_ref leaf = request->peer_cert();
    const std::string sentence =
        refusal({leaf.data(), leaf.size()}, {chain.data(), chain.size()});
    if (!sentence.empty()) {
      told_(sentence);
      *status = grpc::Status(grpc::StatusCode::UNAUTHENTICATED, sentence);
    }
    return true;
  }
  void Cancel(grpc::experimental::TlsCustomVerificationCheckRequest*) override {}

 private:
  // `rest` is what the peer sent above its own certificate; on one side with it, on the other
  // without, as OpenSSL has it.
  std::string refusal(std::string_view leaf, std::string_view rest) const {
    try {
      std::vector<net::Certificate> chain =
          net::Certificate::parse(leaf, "certificate of the peer");
      if (!rest.empty())
        for (net::Certificate& above : net::Certificate::parse(rest, "certificate of the peer"))
          if (above.info().fingerprint != chain[0].info().fingerprint)
            chain.push_back(std::move(above));
      if (const auto found = current_()->verifier().problem(chain, usage_, "certificate of the peer"))
        return to_string(*found);
      return judge_(chain[0].info());
    } catch (const std::exception& error) {
      return error.what();
    }
  }

  const Current current_;
  const net::Usage usage_;
  const Judge judge_;
  const Told told_;
};

// This version of gRPC knows no lowest version of TLS above 1.2. So the cipher list of 1.2, which
// 1.3 does not use, is left with one that our certificates cannot serve: 1.2 finds no shared
// cipher. And gRPC's own lines, one for each stranger's failed handshake, are for who asks for
// them. Before gRPC reads either, once.
void only_tls_1_3() {
  static const int done = ::setenv("GRPC_SSL_CIPHER_SUITES", "PSK-AES128-GCM-SHA256", 1) +
                          ::setenv("GRPC_VERBOSITY", "NONE", 0);
  (void)done;
}

std::shared_ptr<grpc::experimental::CertificateProviderInterface> provider(
    const net::TlsMaterial& tls) {
  only_tls_1_3();
  return std::make_shared<grpc::experimental::StaticDataCertificateProvider>(
      tls.authorities_pem(), std::vector<grpc::experimental::IdentityKeyCertPair>{
                                 {std::string(tls.key_pem().view()), tls.chain_pem()}});
}

// The server's certificate, as ControlSecurity::current() has it. This version of gRPC takes renewed
// ones from files only, with unencrypted keys: so they lie in memory that only this process's own
// descriptors lead to, as one file that is replaced whole.
class OwnCertificate {
 public:
  explicit OwnCertificate(const ControlSecurity& security)
      : security_(security), material_(security.current()), file_(write(*material_)) {
    only_tls_1_3();
    const std::string path = fmt::format("/proc/self/fd/{}", file_.get());
    provider_ = std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(
        path, path, kLookSeconds);
    if (security_.renewed) watcher_ = std::jthread([this](const std::stop_token& s) { watch(s); });
  }
  ~OwnCertificate() {
    watcher_.request_stop();
    wake_.notify_all();
  }
  OwnCertificate(const OwnCertificate&) = delete;
  OwnCertificate& operator=(const OwnCertificate&) = delete;

  [[nodiscard]] std::shared_ptr<grpc::experimental::CertificateProviderInterface> provider() const {
    return provider_;
  }
  [[nodiscard]] std::shared_ptr<const net::TlsMaterial> current() const {
    const std::lock_guard lock(mutex_);
    return material_;
  }

 private:
  static constexpr unsigned kLookSeconds = 1;

  static UniqueFd write(const net::TlsMaterial& material) {
    UniqueFd file(::memfd_create("phalanx-control-certificate", MFD_CLOEXEC));
    const auto put = [&](std::string_view text) {
      while (file.valid() && !text.empty()) {
        const ssize_t n = ::write(file.get(), text.data(), text.size());
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) file.reset();
        text.remove_prefix(static_cast<size_t>(std::max<ssize_t>(n, 0)));
      }
    };
    put(material.key_pem().view());
    put(material.chain_pem());
    if (!file.valid())
      throw Error(Code::kResourceExhausted,
                  fmt::format("no memory for the certificate of the control port: {}",
                              std::strerror(errno)));
    return file;
  }

  void watch(const std::stop_token& stop) {
    std::unique_lock lock(mutex_);
    while (!wake_.wait_for(lock, stop, std::chrono::seconds(kLookSeconds), [] { return false; }) &&
           !stop.stop_requested()) {
      auto now = security_.renewed();
      if (now == material_) continue;
      try {
        const UniqueFd fresh = write(*now);
        if (::dup3(fresh.get(), file_.get(), O_CLOEXEC) < 0) continue;
        material_ = std::move(now);
      } catch (const std::exception& error) {
        log_warn("control plane: {}; the old certificate stays", error.what());
      }
    }
  }

  const ControlSecurity security_;
  mutable std::mutex mutex_;
  std::condition_variable_any wake_;
  std::shared_ptr<const net::TlsMaterial> material_;  // guarded by mutex_
  const UniqueFd file_;
  std::shared_ptr<grpc::experimental::CertificateProviderInterface> provider_;
  std::jthread watcher_;
};

}  // namespace

std::string role_of(const RankTable& table, const std::string& address) {
  const Server& master = table.servers[static_cast<size_t>(table.master())];
  return std::string(net::same_address(address, master.address()) ? kMasterRole : kSlaveRole);
}

std::optional<Problem> slave_problem(const net::CertificateInfo& info, const RankTable& table,
                                     int server) {
  const std::string where = "certificate of the peer";
  if (server >= 0) {
    const std::string& address = table.servers[static_cast<size_t>(server)].address();
    return net::identity_problem(info, {address}, role_of(table, address), where);
  }
  std::string slaves;
  for (int i = 0; i < static_cast<int>(table.servers.size()); ++i) {
    if (i == table.master()) continue;
    const std::string& address = table.servers[static_cast<size_t>(i)].address();
    if (info.names(address))
      return net::identity_problem(info, {address}, role_of(table, address), where);
    slaves += (slaves.empty() ? "" : ", ") + address;
  }
  auto problem = net::identity_problem(info, {slaves}, "", where);
  if (problem) problem->expected = "a slave of the rank table: " + slaves;
  return problem;
}

std::optional<Problem> master_problem(const net::CertificateInfo& info, const RankTable& table) {
  auto problem = net::identity_problem(
      info, {table.servers[static_cast<size_t>(table.master())].address()},
      std::string(kMasterRole), "certificate of the peer");
  if (problem) problem->expected += ", the master of the rank table";
  return problem;
}

net::TlsNeeds node_needs(const RankTable& table, int own_server) {
  const Server& own = table.servers[static_cast<size_t>(own_server)];
  net::TlsNeeds needs{.server = true, .client = true, .addresses = {own.address()}};
  for (const Device& device : own.devices)
    if (!device.device_ip.empty() && net::is_local(device.device_ip))
      needs.addresses.push_back(device.device_ip);
  needs.role = role_of(table, own.address());
  needs.fix = "phalanx certs init with the rank table in use, and give this node its own folder";
  return needs;
}

std::shared_ptr<grpc::ServerCredentials> server_credentials(const ControlSecurity& security) {
  if (security.tls == nullptr) return grpc::InsecureServerCredentials();
  const Judge judge = [table = security.table](const net::CertificateInfo& info) {
    const auto problem = slave_problem(info, table, -1);
    return problem ? to_string(*problem) : std::string();
  };
  const auto limit = std::make_shared<LogLimit>();  // strangers may try for ever
  const Told told = [limit](const std::string& sentence) {
    std::string note;
    if (limit->allow(&note)) log_warn("control plane refused a peer: {}{}", sentence, note);
  };
  const auto own = std::make_shared<OwnCertificate>(security);
  grpc::experimental::TlsServerCredentialsOptions options(own->provider());
  options.watch_identity_key_cert_pairs();
  // "Don't verify" is gRPC's own part; the verifier below does all of it, with reasons.
  options.set_cert_request_type(
      GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_BUT_DONT_VERIFY);
  options.set_check_call_host(false);
  options.set_certificate_verifier(
      grpc::experimental::ExternalCertificateVerifier::Create<Verifier>(
          [own] { return own->current(); }, net::Usage::kClient, judge, told));
  return grpc::experimental::TlsServerCredentials(options);
}

std::shared_ptr<grpc::ChannelCredentials> channel_credentials(const ControlSecurity& security,
                                                              std::shared_ptr<RefusalNote> note) {
  if (security.tls == nullptr) return grpc::InsecureChannelCredentials();
  const Judge judge = [table = security.table](const net::CertificateInfo& info) {
    const auto problem = master_problem(info, table);
    return problem ? to_string(*problem) : std::string();
  };
  grpc::experimental::TlsChannelCredentialsOptions options;
  const auto current = security.current();
  options.set_certificate_provider(provider(*current));
  options.watch_root_certs();
  options.watch_identity_key_cert_pairs();
  options.set_verify_server_certs(false);
  options.set_check_call_host(false);
  options.set_certificate_verifier(
      grpc::experimental::ExternalCertificateVerifier::Create<Verifier>(
          [current] { return current; }, net::Usage::kServer, judge,
          [note = std::move(note)](const std::string& sentence) { note->set(sentence); }));
  return grpc::experimental::TlsCredentials(options);
}

}  // namespace phalanx::cluster
