// Damaged certificates, keys, revocation lists, password files and key stores: read or refused with
// a sentence that names the file. PHALANX_FUZZ_SECONDS per reader; `make fuzz`.

#include <gtest/gtest.h>

#include <ctime>
#include <iostream>

#include "phalanx/base/fuzz.h"
#include "phalanx/net/password_file.h"
#include "phalanx/net/testing_certificates.h"

namespace phalanx::net {
namespace {

constexpr const char* kWhere = "file.pem";

class CertificateFuzz : public ::testing::Test {
 protected:
  // read(text) for damaged seeds: returns, or throws an Error that names the file.
  template <typename Read>
  void damage(const char* what, const std::vector<std::string>& seeds, Read read) {
    int64_t good = 0;
    const int64_t tried = fuzz(seeds, [&](const std::string& text, int64_t number) {
      SCOPED_TRACE(number);
      try {
        read(text);
        ++good;
      } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find(kWhere), std::string::npos) << error.what();
      }
    });
    std::cout << tried << " " << what << ", " << good << " read\n";
    EXPECT_GT(tried, 20);
  }

  static int64_t now() { return std::time(nullptr); }
  PrivateKey key_ = PrivateKey::make(PrivateKey::Kind::kEcP256);
  Authority authority_ = Authority::create("fuzz", key_, now() - 60, now() + 86400);
};

TEST_F(CertificateFuzz, Certificates) {
  const std::string pem =
      authority_.issue(TestCertificates::order("10.0.0.1", "inter-node:master"), key_).pem();
  const Certificate good = Certificate::parse(pem, kWhere)[0];
  const PeerVerifier verifier(
      {.authorities = {authority_.certificate()}, .authority_files = {"ca.pem"}, .crl_files = {}});
  int64_t trusted = 0;
  damage("certificates", {pem, pem + authority_.certificate().pem()}, [&](const std::string& text) {
    const auto chain = Certificate::parse(text, kWhere);
    (void)identity_problem(chain[0].info(), {"10.0.0.1"}, "inter-node:master", kWhere);
    if (verifier.problem(chain, Usage::kServer, kWhere)) return;
    ++trusted;
    // What is trusted is what was signed.
    EXPECT_TRUE(chain[0].info().fingerprint == good.info().fingerprint ||
                chain[0].info().fingerprint == authority_.certificate().info().fingerprint);
  });
  std::cout << trusted << " trusted\n";
}

TEST_F(CertificateFuzz, Keys) {
  damage("keys", {std::string(key_.pem("").view()), std::string(key_.pem("password 1").view())},
         [&](const std::string& text) { (void)PrivateKey::parse(text, "password 1", kWhere); });
}

TEST_F(CertificateFuzz, RevocationLists) {
  damage("lists",
         {authority_.revocation_list({{"0A", now()}, {"0B", now()}}, 3, now() - 60, now() + 86400)},
         [&](const std::string& text) { (void)read_revocation_list(text, kWhere); });
}

TEST_F(CertificateFuzz, PasswordsAndKeyStores) {
  char path[] = "/tmp/phalanx-fuzz-XXXXXX";
  ASSERT_NE(::mkdtemp(path), nullptr);
  const std::string folder = path;
  const Secret store = make_key_store();
  const std::string line = encrypt_password("the password 1", store.view(), "store");
  const std::string store_text(store.view());
  const auto put = [&](const std::string& name, const std::string& text) {
    std::ofstream(folder + "/" + name, std::ios::trunc) << text;
    ::chmod((folder + "/" + name).c_str(), 0600);
  };
  int64_t number = 0;
  damage("password files and key stores", {line + '\n' + store_text}, [&](const std::string& text) {
    const bool store_too = ++number % 2 == 0;
    const size_t end = std::min(text.find('\n'), text.size());
    put("file.pem", text.substr(0, end));
    put("ksfa", store_too ? text.substr(std::min(end + 1, text.size())) : store_text);
    Problems problems;
    Problems warnings;
    const Secret password =
        read_password(folder + "/file.pem", {folder + "/ksfa", ""}, problems, warnings);
    if (problems.empty()) {
      EXPECT_EQ(password.view(), "the password 1");
    } else {
      EXPECT_TRUE(password.empty());
    }
  });
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace phalanx::net
