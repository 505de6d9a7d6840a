#include <gtest/gtest.h>
#include <openssl/bio.h>
#include <openssl/ssl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <ctime>
#include <filesystem>
#include <fstream>

#include "phalanx/net/authority.h"
#include "phalanx/net/tls_context.h"

namespace phalanx::net {
namespace {

constexpr int64_t kDay = 86400;

void put(const std::string& path, std::string_view text, mode_t mode = 0400) {
  std::filesystem::remove(path);
  std::ofstream(path) << text;
  ASSERT_EQ(::chmod(path.c_str(), mode), 0);
}

// A folder with one authority, and files as `phalanx certs init` makes them.
class Tls : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/phalanx-tls-XXXXXX";
    folder_ = ::mkdtemp(name);
    put(at("ca.pem"), ca_.certificate().pem());
    put(at("crl.pem"), ca_.revocation_list({}, 1, now_ - kDay, now_ + kDay));
    const Secret store = make_key_store();
    put(at("store"), store.view());
    put(at("password"), encrypt_password("Correct-Horse", store.view(), "store"));
    issue(order());
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string at(const std::string& name) const { return folder_ + "/" + name; }
  CertificateOrder order() const {
    return {.common_name = "10.0.0.1",
            .unit = "inter-node",
            .role = "inter-node:master",
            .addresses = {"10.0.0.1", "fe80::1", "node1"},
            .for_server = true,
            .for_client = true,
            .not_before = now_ - kDay,
            .not_after = now_ + 100 * kDay};
  }
  void issue(const CertificateOrder& order) { issue(order, key_, ca_); }
  void issue(const CertificateOrder& order, const PrivateKey& key, const Authority& ca) {
    put(at("cert.pem"), ca.issue(order, key).pem());
    put(at("key.pem"), key.pem("Correct-Horse").view());
  }
  TlsFiles files() const {
    return {.plane = "between nodes",
            .certificate = at("cert.pem"),
            .key = at("key.pem"),
            .key_password = at("password"),
            .key_store = {at("store"), ""},
            .authorities = {at("ca.pem")},
            .crls = {at("crl.pem")}};
  }
  TlsNeeds needs() const {
    return {.server = true,
            .client = true,
            .addresses = {"10.0.0.1"},
            .role = "inter-node:master",
            .fix = "phalanx certs init"};
  }
  std::shared_ptr<const TlsMaterial> load() {
    Problems problems;
    auto material = TlsMaterial::load(files(), needs(), problems, warnings_);
    EXPECT_EQ(problems.to_string(), "");
    return material;
  }
  std::string refusal() { return refusal(files(), needs()); }
  std::string refusal(const TlsFiles& files, const TlsNeeds& needs) {
    Problems problems;
    EXPECT_EQ(TlsMaterial::load(files, needs, problems, warnings_), nullptr);
    return problems.to_string();
  }
  static void expect(const std::string& text, const char* part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  }

  const int64_t now_ = std::time(nullptr);
  std::string folder_;
  Authority ca_ = Authority::create("test authority", PrivateKey::make(PrivateKey::Kind::kEcP256),
                                    now_ - kDay, now_ + 365 * kDay);
  Authority other_ = Authority::create("other authority",
                                       PrivateKey::make(PrivateKey::Kind::kEcP256), now_ - kDay,
                                       now_ + 365 * kDay);
  PrivateKey key_ = PrivateKey::make(PrivateKey::Kind::kEcP256);
  Problems warnings_;
};

TEST_F(Tls, ReadsWhatItIssued) {
  const auto material = load();
  ASSERT_NE(material, nullptr);
  const CertificateInfo& own = material->own();
  EXPECT_EQ(own.subject, "CN=10.0.0.1,OU=inter-node,O=Phalanx");
  EXPECT_EQ(own.issuer, "CN=test authority,O=Phalanx");
  EXPECT_EQ(own.role(), "inter-node:master");
  EXPECT_TRUE(own.names("10.0.0.1") && own.names("FE80:0::1") && own.names("node1"));
  EXPECT_FALSE(own.names("10.0.0.2"));
  EXPECT_EQ(own.key_type, "EC P-256");
  EXPECT_TRUE(own.strong_key && own.for_server && own.for_client);
  EXPECT_FALSE(own.authority);
  EXPECT_EQ(own.not_after, now_ + 100 * kDay);
  EXPECT_EQ(own.version, 3);
  EXPECT_EQ(own.fingerprint.size(), 64u);
  EXPECT_EQ(Certificate::parse(material->chain_pem(), "x")[0].info().serial, own.serial);
  EXPECT_NE(material->key_pem().view().find("BEGIN PRIVATE KEY"), std::string_view::npos);
  EXPECT_TRUE(warnings_.empty());
}

TEST_F(Tls, EachBadCertificateHasItsSentence) {
  CertificateOrder bad = order();
  bad.not_after = now_ - 3600;
  issue(bad);
  expect(refusal(), "certificate has expired");
  bad = order();
  bad.not_before = now_ + kDay;
  issue(bad);
  expect(refusal(), "certificate is not yet valid");
  issue(order(), key_, other_);
  expect(refusal(), "signed by another authority");
  expect(refusal(), "CN=other authority");
  bad = order();
  bad.addresses = {"10.0.0.2"};
  issue(bad);
  expect(refusal(), "certificate is of another node");
  expect(refusal(), "found subject alternative names 10.0.0.2, expected 10.0.0.1");
  bad = order();
  bad.role = "service";
  issue(bad);
  expect(refusal(), "certificate is of another role");
  bad = order();
  bad.for_server = false;
  issue(bad);
  expect(refusal(), "may not be used by a server");
  bad = order();
  bad.for_client = false;
  issue(bad);
  expect(refusal(), "may not be used by a client");
  issue(order(), PrivateKey::make(PrivateKey::Kind::kRsa, 2048), ca_);
  expect(refusal(), "weak key");
  expect(refusal(), "RSA 2048");
}

TEST_F(Tls, EachBadFileHasItsSentence) {
  const std::string certificate = ca_.issue(order(), key_).pem();
  put(at("cert.pem"), "-----BEGIN CERTIFICATE-----\nMIIBroken\n-----END CERTIFICATE-----\n");
  expect(refusal(), "broken certificate");
  put(at("cert.pem"), "hello");
  expect(refusal(), "no certificate");
  put(at("cert.pem"), certificate);
  const Secret other_key = PrivateKey::make(PrivateKey::Kind::kEcP256).pem("Correct-Horse");
  put(at("key.pem"), other_key.view());
  expect(refusal(), "private key does not match the certificate");
  put(at("key.pem"), key_.pem("Other-Password").view());
  expect(refusal(), "password of the private key is wrong");
  put(at("key.pem"), "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n");
  expect(refusal(), "private key is broken");
  put(at("key.pem"), key_.pem("Correct-Horse").view(), 0444);
  expect(refusal(), "file permissions too wide");
  ASSERT_EQ(::rename(at("key.pem").c_str(), at("real.pem").c_str()), 0);
  std::filesystem::create_symlink(at("real.pem"), at("key.pem"));
  expect(refusal(), "symbolic link");
  std::filesystem::remove(at("key.pem"));
  put(at("key.pem"), key_.pem("Correct-Horse").view());
  TlsFiles none = files();
  none.key_password.clear();
  expect(refusal(none, needs()), "no password file is named");
  put(at("password"), "Correct-Horse\n");
  expect(refusal(), "password file is not in the format of Phalanx");
  put(at("password"), encrypt_password("Correct-Horse", make_key_store().view(), "x"));
  expect(refusal(), "encrypted with another key store");
}

TEST_F(Tls, RevocationListsAreJudged) {
  const auto revoked = Certificate::parse(load()->chain_pem(), "x")[0].info().serial;
  put(at("crl.pem"), ca_.revocation_list({{revoked, now_ - 60}}, 2, now_ - 60, now_ + kDay));
  expect(refusal(), "certificate was revoked");
  expect(refusal(), revoked.c_str());
  put(at("crl.pem"), ca_.revocation_list({}, 3, now_ - 2 * kDay, now_ - kDay));
  expect(refusal(), "revocation list has expired");
  put(at("crl.pem"), "nonsense");
  expect(refusal(), "revocation list is broken");
  put(at("crl.pem"), other_.revocation_list({}, 3, now_ - kDay, now_ + kDay));
  expect(refusal(), "revocation list was signed by another authority");
  std::filesystem::remove(at("crl.pem"));
  expect(refusal(), "revocation list is not readable");
  put(at("crl.pem"), ca_.revocation_list({{"AB", now_ - 60}}, 4, now_ - 60, now_ + kDay));
  EXPECT_NE(load(), nullptr);
}

TEST_F(Tls, ListsOfReadBack) {
  const std::string pem = ca_.revocation_list({{"0123AB", now_}}, 7, now_ - 1, now_ + kDay);
  const RevocationList list = read_revocation_list(pem, "crl");
  EXPECT_EQ(list.number, 7);
  EXPECT_EQ(list.next_update, now_ + kDay);
  ASSERT_EQ(list.revoked.size(), 1u);
  EXPECT_EQ(list.revoked[0].serial, "0123AB");
  EXPECT_EQ(list.issuer, "CN=test authority,O=Phalanx");
}

TEST_F(Tls, DamagedKeyStoreHasACopy) {
  put(at("copy"), [&] {
    std::ifstream in(at("store"));
    return std::string(std::istreambuf_iterator<char>(in), {});
  }());
  put(at("store"), "PHXKEY1:short\n");
  TlsFiles both = files();
  both.key_store.standby = at("copy");
  Problems problems;
  EXPECT_NE(TlsMaterial::load(both, needs(), problems, warnings_), nullptr) << problems.to_string();
  expect(warnings_.to_string(), "key store of the passwords is not one of Phalanx's");
  expect(refusal(), "key store of the passwords is not one of Phalanx's");
}

// Runs a handshake in memory. The sentences of both sides.
std::pair<std::string, std::string> shake(const TlsContext& client, const TlsContext& server) {
  SSL* c = SSL_new(client.native());
  SSL* s = SSL_new(server.native());
  BIO* to_server = nullptr;
  BIO* to_client = nullptr;
  BIO_new_bio_pair(&to_server, 0, &to_client, 0);
  SSL_set_bio(c, to_server, to_server);
  SSL_set_bio(s, to_client, to_client);
  SSL_set_connect_state(c);
  SSL_set_accept_state(s);
  for (int i = 0; i < 10; ++i) {
    SSL_do_handshake(c);
    SSL_do_handshake(s);
  }
  std::pair<std::string, std::string> sentences{refusal(c), refusal(s)};
  if (sentences.first.empty() && sentences.second.empty()) {
    EXPECT_TRUE(SSL_is_init_finished(c) && SSL_is_init_finished(s));
    EXPECT_STREQ(SSL_get_version(c), "TLSv1.3");
    EXPECT_EQ(peer_certificate(s)->info().subject, "CN=10.0.0.1,OU=inter-node,O=Phalanx");
  }
  SSL_free(c);
  SSL_free(s);
  return sentences;
}

TEST_F(Tls, PeersAreJudged) {
  const auto good = load();
  std::vector<std::string> told;
  const TlsContext server(good, {.side = TlsContext::Side::kServer,
                                 .refused = [&](const std::string& s) { told.push_back(s); }});
  const TlsContext client(good, {.side = TlsContext::Side::kClient});
  EXPECT_EQ(shake(client, server), std::make_pair(std::string(), std::string()));

  // Another authority: each side trusts its own only.
  put(at("ca.pem"), other_.certificate().pem());
  put(at("crl.pem"), other_.revocation_list({}, 1, now_ - kDay, now_ + kDay));
  issue(order(), key_, other_);
  const auto foreign = load();
  const TlsContext stranger(foreign, {.side = TlsContext::Side::kClient});
  expect(shake(stranger, server).first, "signed by another authority");
  put(at("ca.pem"), ca_.certificate().pem());
  put(at("crl.pem"), ca_.revocation_list({}, 1, now_ - kDay, now_ + kDay));

  // A revocation is seen by connections that come later, without a restart.
  const std::string serial = good->own().serial;
  put(at("crl.pem"), ca_.revocation_list({{serial, now_ - 60}}, 2, now_ - 60, now_ + kDay));
  expect(shake(client, server).first, "certificate was revoked");
  put(at("crl.pem"), ca_.revocation_list({}, 3, now_ - 60, now_ + kDay));
  EXPECT_EQ(shake(client, server).first, "");

  const TlsContext picky(good, {.side = TlsContext::Side::kServer,
                                .identity = [](const CertificateInfo& peer) {
                                  return "not " + peer.subject;
                                }});
  expect(shake(client, picky).second, "not CN=10.0.0.1");
}

TEST_F(Tls, ServerNamesABadClient) {
  const auto good = load();
  std::vector<std::string> told;
  const TlsContext server(good, {.side = TlsContext::Side::kServer,
                                 .refused = [&](const std::string& s) { told.push_back(s); }});
  CertificateOrder bad = order();
  bad.for_client = false;
  issue(bad);
  Problems problems;
  TlsNeeds server_only = needs();
  server_only.client = false;
  const auto wrong = TlsMaterial::load(files(), server_only, problems, warnings_);
  ASSERT_NE(wrong, nullptr) << problems.to_string();
  const TlsContext client(wrong, {.side = TlsContext::Side::kClient});
  expect(shake(client, server).second, "may not be used by a client");
  ASSERT_EQ(told.size(), 1u);
  expect(told[0], "certificate of the peer");
}

TEST(Password, Strength) {
  EXPECT_EQ(password_weakness("Abcdefg1"), "");
  EXPECT_NE(password_weakness("Abc1").find("8 at least"), std::string::npos);
  EXPECT_NE(password_weakness("abcdefgh").find("two of"), std::string::npos);
  EXPECT_EQ(password_weakness(random_password().view()), "");
}

}  // namespace
}  // namespace phalanx::net
