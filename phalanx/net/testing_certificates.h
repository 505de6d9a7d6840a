#pragma once

// For tests: an authority and materials of it, in a folder that goes with the object.

#include <sys/stat.h>

#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>

#include "phalanx/net/authority.h"
#include "phalanx/net/tls_material.h"

namespace phalanx::net {

class TestCertificates {
 public:
  explicit TestCertificates(const std::string& name = "test authority")
      : authority_(Authority::create(name, PrivateKey::make(PrivateKey::Kind::kEcP256),
                                     now() - 86400, now() + 8640000)) {
    char path[] = "/tmp/phalanx-test-XXXXXX";
    folder_ = ::mkdtemp(path);
    put("ca.pem", authority_.certificate().pem());
    put("crl.pem", authority_.revocation_list({}, 1, now() - 3600, now() + 86400));
  }
  ~TestCertificates() { std::filesystem::remove_all(folder_); }
  TestCertificates(const TestCertificates&) = delete;
  TestCertificates& operator=(const TestCertificates&) = delete;

  static int64_t now() { return std::time(nullptr); }

  // A good order for the node at `address`.
  static CertificateOrder order(const std::string& address, const std::string& role) {
    return {.common_name = address,
            .unit = "inter-node",
            .role = role,
            .addresses = {address},
            .for_server = true,
            .for_client = true,
            .not_before = now() - 3600,
            .not_after = now() + 86400};
  }

  // What the order gives, loaded without looking at it: bad ones too.
  std::shared_ptr<const TlsMaterial> material(const CertificateOrder& order,
                                              const PrivateKey& key = PrivateKey::make(
                                                  PrivateKey::Kind::kEcP256)) {
    const std::string at = std::to_string(++count_);
    put("cert" + at + ".pem", authority_.issue(order, key).pem());
    put("key" + at + ".pem", key.pem("").view());
    Problems problems;
    Problems warnings;
    auto material = TlsMaterial::load({.plane = "between nodes",
                                       .certificate = file("cert" + at + ".pem"),
                                       .key = file("key" + at + ".pem"),
                                       .authorities = {file("ca.pem")},
                                       .crls = {file("crl.pem")}},
                                      {.server = false, .client = false}, problems, warnings);
    problems.throw_if_any("test certificate");
    return material;
  }
  std::shared_ptr<const TlsMaterial> material(const std::string& address, const std::string& role) {
    return material(order(address, role));
  }
  void revoke(const TlsMaterial& material) {
    put("crl.pem", authority_.revocation_list({{material.own().serial, now() - 60}}, ++list_,
                                              now() - 60, now() + 86400));
  }
  void revoke_nothing() {
    put("crl.pem", authority_.revocation_list({}, ++list_, now() - 60, now() + 86400));
  }
  [[nodiscard]] std::string file(const std::string& name) const { return folder_ + "/" + name; }

 private:
  void put(const std::string& name, std::string_view text) {
    const std::string fresh = file(name) + ".new";
    std::ofstream(fresh) << text;
    ::chmod(fresh.c_str(), 0400);
    std::filesystem::rename(fresh, file(name));
  }

  Authority authority_;
  std::string folder_;
  int count_ = 0;
  int64_t list_ = 1;
};

}  // namespace phalanx::net
