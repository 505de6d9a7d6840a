#include <gtest/gtest.h>
#include <openssl/ssl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <ctime>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <thread>

#include "phalanx/api/http_server.h"
#include "phalanx/api/plane_tls.h"
#include "phalanx/api/testing_client.h"
#include "phalanx/net/authority.h"

namespace phalanx::api {
namespace {

using net::Authority;
using net::CertificateOrder;
using net::PrivateKey;

constexpr int64_t kDay = 86400;
constexpr unsigned kPlanes[] = {kBusiness, kManagement, kMetrics};

void put(const std::string& path, std::string_view text, mode_t mode = 0400) {
  const std::string fresh = path + ".new";
  std::filesystem::remove(fresh);
  std::ofstream(fresh) << text;
  ASSERT_EQ(::chmod(fresh.c_str(), mode), 0);
  std::filesystem::rename(fresh, path);
}

// A client's certificate and key; none: it shows none.
struct Identity {
  std::vector<net::Certificate> chain;
  std::shared_ptr<PrivateKey> key;
};

// A blocking HTTPS client. It trusts every server: the tests look at what the server does.
class TlsClient {
 public:
  TlsClient(uint16_t port, const Identity& identity) : context_(SSL_CTX_new(TLS_client_method())) {
    SSL_CTX_set_security_level(context_, 0);
    if (!identity.chain.empty()) {
      SSL_CTX_use_certificate(context_, identity.chain[0].native());
      SSL_CTX_use_PrivateKey(context_, identity.key->native());
    }
    fd_.reset(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const timeval limit{.tv_sec = 10, .tv_usec = 0};
    ::setsockopt(fd_.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(::connect(fd_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    ssl_ = SSL_new(context_);
    SSL_set_fd(ssl_, fd_.get());
    connected_ = SSL_connect(ssl_) == 1;
  }
  ~TlsClient() {
    SSL_free(ssl_);
    SSL_CTX_free(context_);
  }
  // The whole answer; empty if the server refused (with TLS 1.3 a client hears of it on reading).
  std::string ask(std::string_view request) {
    if (!connected_ || SSL_write(ssl_, request.data(), static_cast<int>(request.size())) <= 0) return {};
    std::string text;
    char buffer[16384];
    for (;;) {
      const int n = SSL_read(ssl_, buffer, sizeof buffer);
      if (n <= 0) return text;
      text.append(buffer, static_cast<size_t>(n));
    }
  }
  [[nodiscard]] std::string server_serial() const {
    X509* x509 = SSL_get0_peer_certificate(ssl_);
    return x509 == nullptr ? "" : net::Certificate(x509).info().serial;
  }
  void key_update() { SSL_key_update(ssl_, SSL_KEY_UPDATE_REQUESTED); }

 private:
  SSL_CTX* context_;
  UniqueFd fd_;
  SSL* ssl_ = nullptr;
  bool connected_ = false;
};

const std::string kGet = "GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

class TlsPlanes : public ::testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/phalanx-planes-XXXXXX";
    folder_ = ::mkdtemp(name);
    put(at("ca.pem"), ca_.certificate().pem());
    put(at("crl.pem"), ca_.revocation_list({}, 1, now_ - kDay, now_ + kDay));
    for (const char* plane : {"business", "management", "metrics"}) issue_server(plane, server_order());
  }
  void TearDown() override {
    if (server_) server_->stop(Deadline::in_seconds(1));
    std::filesystem::remove_all(folder_);
  }
  std::string at(const std::string& name) const { return folder_ + "/" + name; }

  CertificateOrder server_order() const {
    return {.common_name = "service",
            .addresses = {"127.0.0.1"},
            .for_server = true,
            .for_client = false,
            .not_before = now_ - kDay,
            .not_after = now_ + 100 * kDay};
  }
  CertificateOrder client_order() const {
    CertificateOrder order = server_order();
    order.common_name = "caller";
    order.for_server = false;
    order.for_client = true;
    return order;
  }
  void issue_server(const std::string& plane, const CertificateOrder& order) {
    put(at(plane + ".pem"), ca_.issue(order, key_).pem());
    put(at(plane + ".key"), key_.pem("").view());
  }
  Identity identity(const CertificateOrder& order) { return identity(order, ca_, key_); }
  static Identity identity(const CertificateOrder& order, const Authority& ca, const PrivateKey& key) {
    return {{ca.issue(order, key)}, std::make_shared<PrivateKey>(key)};
  }
  PlaneTls::Plane plane(const std::string& name) const {
    return {.files = {.plane = name,
                      .certificate = at(name + ".pem"),
                      .key = at(name + ".key"),
                      .authorities = {at("ca.pem")},
                      .crls = {at("crl.pem")}},
            .needs = {.server = true},
            .address = "127.0.0.1"};
  }
  void open() {
    Problems warnings;
    tls_ = std::make_unique<PlaneTls>(
        std::vector{plane("business"), plane("management"), plane("metrics")}, warnings,
        PlaneTls::Options{.look_seconds = 0.05});
    ServerOptions options;
    options.handshake_seconds = 0.5;
    options.on_finished = [this](const AccessRecord& record) {
      const std::lock_guard lock(mutex_);
      users_.push_back(record.user);
    };
    for (size_t i = 0; i < 3; ++i)
      options.listeners.push_back(
          {"127.0.0.1", 0, kPlanes[i], [this, i] { return tls_->current(i); }});
    server_ = std::make_unique<Server>(options);
    for (const unsigned p : kPlanes) {
      server_->route(static_cast<Plane>(p), "GET", "/hello",
                     [](const HttpRequest&, const auto& responder) {
                       responder->respond({.content_type = "text/plain", .body = "hello", .headers = {}});
                     });
      server_->route(static_cast<Plane>(p), "POST", "/echo",
                     [](const HttpRequest& request, const auto& responder) {
                       responder->respond(
                           {.content_type = "text/plain", .body = request.body, .headers = {}});
                     });
    }
    server_->start();
    ports_ = server_->ports();
  }
  std::string hello(size_t listener, const Identity& who) {
    return testing::parse_reply(TlsClient(ports_[listener], who).ask(kGet)).body;
  }
  // What a start says about these files.
  std::string refused_start() {
    Problems warnings;
    try {
      const PlaneTls tls({plane("business"), plane("management"), plane("metrics")}, warnings, {});
      return "";
    } catch (const Error& error) {
      return error.what();
    }
  }

  const int64_t now_ = std::time(nullptr);
  std::string folder_;
  Authority ca_ = Authority::create("test authority", PrivateKey::make(PrivateKey::Kind::kEcP256),
                                    now_ - kDay, now_ + 365 * kDay);
  Authority other_ = Authority::create(
      "other authority", PrivateKey::make(PrivateKey::Kind::kEcP256), now_ - kDay, now_ + 365 * kDay);
  PrivateKey key_ = PrivateKey::make(PrivateKey::Kind::kEcP256);
  std::unique_ptr<PlaneTls> tls_;
  std::unique_ptr<Server> server_;
  std::vector<uint16_t> ports_;
  std::mutex mutex_;
  std::vector<std::string> users_;
};

TEST_F(TlsPlanes, ServeClientsOfTheirAuthority) {
  open();
  const Identity good = identity(client_order());
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(hello(i, good), "hello") << i;
  {
    const std::lock_guard lock(mutex_);
    ASSERT_EQ(users_.size(), 3U);
    EXPECT_EQ(users_[0].substr(0, 9), "CN=caller");
  }
  // Bytes arrive whole, in both directions, also across a key update.
  std::string big(3 << 20, 'x');
  for (size_t i = 0; i < big.size(); i += 997) big[i] = static_cast<char>('a' + i % 23);
  TlsClient client(ports_[0], good);
  client.key_update();
  const std::string answer = client.ask(
      testing::post_text("/echo", big, "Connection: close\r\n"));
  EXPECT_EQ(testing::parse_reply(answer).body, big);
}

TEST_F(TlsPlanes, RefuseEachBadClientCertificateOnEachListenerAndServeOthers) {
  CertificateOrder expired = client_order();
  expired.not_after = now_ - 3600;
  CertificateOrder early = client_order();
  early.not_before = now_ + kDay;
  CertificateOrder server_only = client_order();
  server_only.for_server = true;
  server_only.for_client = false;
  const Identity good = identity(client_order());
  const Identity revoked = identity(client_order());
  put(at("crl.pem"), ca_.revocation_list({{revoked.chain[0].info().serial, now_ - 60}}, 2, now_ - kDay,
                                         now_ + kDay));
  const PrivateKey weak = PrivateKey::make(PrivateKey::Kind::kRsa, 2048);
  const std::vector<std::tuple<std::string, Identity, std::string>> cases = {
      {"none", {}, "this plane asks for a client certificate"},
      {"expired", identity(expired), "certificate has expired"},
      {"not yet valid", identity(early), "certificate is not yet valid"},
      {"another authority", identity(client_order(), other_, key_), "signed by another authority"},
      {"wrong usage", identity(server_only), "may not be used by a client"},
      {"weak key", identity(client_order(), ca_, weak), "weak key"},
      {"revoked", revoked, "certificate was revoked"},
  };
  open();
  for (size_t listener = 0; listener < 3; ++listener) {
    for (const auto& [name, who, sentence] : cases) {
      ::testing::internal::CaptureStderr();
      EXPECT_EQ(hello(listener, who), "") << name << " on listener " << listener;
      EXPECT_EQ(hello(listener, good), "hello") << "after " << name;
      const std::string log = ::testing::internal::GetCapturedStderr();
      EXPECT_NE(log.find(sentence), std::string::npos) << name << ": " << log;
      EXPECT_NE(log.find(listener == 0   ? "business plane failed"
                         : listener == 1 ? "management plane failed"
                                         : "metrics plane failed"),
                std::string::npos)
          << log;
    }
    // Not TLS at all, and a client that never begins.
    ::testing::internal::CaptureStderr();
    testing::Client plain(ports_[listener]);
    plain.send(kGet);
    plain.read_all();
    testing::Client silent(ports_[listener]);
    silent.read_all();
    EXPECT_TRUE(silent.closed());
    EXPECT_EQ(hello(listener, good), "hello");
    EXPECT_NE(::testing::internal::GetCapturedStderr().find("speaks plain HTTP"), std::string::npos);
  }
  // What happens to the revocation list while the server runs.
  const std::vector<std::pair<std::string, std::string>> lists = {
      {ca_.revocation_list({}, 3, now_ - 2 * kDay, now_ - kDay), "revocation list has expired"},
      {"nonsense", "revocation list is broken"},
      {other_.revocation_list({}, 3, now_ - kDay, now_ + kDay),
       "no revocation list of the certificate's issuer"},
  };
  for (const auto& [list, sentence] : lists) {
    put(at("crl.pem"), list);
    for (size_t listener = 0; listener < 3; ++listener) {
      ::testing::internal::CaptureStderr();
      EXPECT_EQ(hello(listener, good), "");
      EXPECT_NE(::testing::internal::GetCapturedStderr().find(sentence), std::string::npos);
    }
  }
  put(at("crl.pem"), ca_.revocation_list({}, 4, now_ - kDay, now_ + kDay));
  for (size_t listener = 0; listener < 3; ++listener) EXPECT_EQ(hello(listener, good), "hello");
}

TEST_F(TlsPlanes, EachBadCertificateOfAPlaneIsRefusedAtStartByName) {
  EXPECT_EQ(refused_start(), "");
  const auto expect = [&](const std::string& plane, const char* sentence) {
    const std::string text = refused_start();
    EXPECT_NE(text.find(sentence), std::string::npos) << text;
    EXPECT_NE(text.find(at(plane)), std::string::npos) << text;
    issue_server(plane, server_order());
    EXPECT_EQ(refused_start(), "");
  };
  for (const std::string plane : {"business", "management", "metrics"}) {
    CertificateOrder order = server_order();
    order.not_after = now_ - 3600;
    issue_server(plane, order);
    expect(plane, "certificate has expired");
    order = server_order();
    order.not_before = now_ + kDay;
    issue_server(plane, order);
    expect(plane, "certificate is not yet valid");
    order = server_order();
    order.addresses = {"10.9.9.9"};
    issue_server(plane, order);
    expect(plane, "certificate does not name the address of its plane");
    issue_server(plane, client_order());
    expect(plane, "may not be used by a server");
    put(at(plane + ".pem"), other_.issue(server_order(), key_).pem());
    expect(plane, "signed by another authority");
    const PrivateKey weak = PrivateKey::make(PrivateKey::Kind::kRsa, 2048);
    put(at(plane + ".pem"), ca_.issue(server_order(), weak).pem());
    put(at(plane + ".key"), weak.pem("").view());
    expect(plane, "weak key");
    put(at(plane + ".pem"), "-----BEGIN CERTIFICATE-----\nMIIBroken\n-----END CERTIFICATE-----\n");
    expect(plane, "broken certificate");
    put(at(plane + ".key"), PrivateKey::make(PrivateKey::Kind::kEcP256).pem("").view());
    expect(plane, "private key does not match the certificate");
    put(at(plane + ".key"), key_.pem("").view(), 0444);
    expect(plane, "file permissions too wide");
    std::filesystem::rename(at(plane + ".key"), at("real"));
    std::filesystem::create_symlink(at("real"), at(plane + ".key"));
    expect(plane, "symbolic link");
  }
}

TEST_F(TlsPlanes, ARenewedCertificateServesNewConnectionsAndABadOneIsNotTaken) {
  open();
  const Identity good = identity(client_order());
  TlsClient before(ports_[0], good);
  const std::string old_serial = before.server_serial();

  ::testing::internal::CaptureStderr();
  put(at("business.pem"), other_.issue(server_order(), key_).pem());
  std::string log;
  const Deadline deadline = Deadline::in_seconds(10);
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  EXPECT_EQ(TlsClient(ports_[0], good).server_serial(), old_serial);
  log = ::testing::internal::GetCapturedStderr();
  EXPECT_NE(log.find("the old ones stay in use"), std::string::npos) << log;
  EXPECT_NE(log.find("signed by another authority"), std::string::npos) << log;

  issue_server("business", server_order());
  std::string serial = old_serial;
  while (serial == old_serial && !deadline.passed()) {
    serial = TlsClient(ports_[0], good).server_serial();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  EXPECT_NE(serial, old_serial);
  EXPECT_EQ(testing::parse_reply(before.ask(kGet)).body, "hello");  // it lives on
}

TEST_F(TlsPlanes, WarnsThirtyDaysAhead) {
  net::CertificateInfo info;
  info.subject = "CN=x";
  info.not_after = now_ + 31 * kDay;
  EXPECT_EQ(expiry_warning(info, now_, 30), "");
  info.not_after = now_ + 12 * kDay + 5;
  EXPECT_EQ(expiry_warning(info, now_, 30).substr(0, 34), "certificate CN=x ends in 12 days, ");
  info.not_after = now_ - 5;
  EXPECT_EQ(expiry_warning(info, now_, 30).substr(0, 26), "certificate CN=x ended on ");
}

}  // namespace
}  // namespace phalanx::api
