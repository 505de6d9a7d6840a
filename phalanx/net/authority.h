#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/net/certificate.h"
#include "phalanx/net/secret.h"

struct evp_pkey_st;  // OpenSSL's EVP_PKEY

namespace phalanx::net {

// A private key.
class PrivateKey {
 public:
  enum class Kind { kEcP256, kRsa };
  // `rsa_bits` for kRsa only.
  [[nodiscard]] static PrivateKey make(Kind kind, int rsa_bits = 3072);
  // Throws Error(kInvalidArgument): broken, or a wrong password (empty: none).
  [[nodiscard]] static PrivateKey parse(std::string_view pem, std::string_view password,
                                        const std::string& where);
  // PKCS#8 PEM, encrypted with AES-256-CBC under PBKDF2 unless the password is empty.
  [[nodiscard]] Secret pem(std::string_view password) const;
  [[nodiscard]] evp_pkey_st* native() const { return key_.get(); }

 private:
  explicit PrivateKey(evp_pkey_st* key);
  std::shared_ptr<evp_pkey_st> key_;
};

// Whether the key is the certificate's.
[[nodiscard]] bool matches(const Certificate& certificate, const PrivateKey& key);

// What a new certificate shall say.
struct CertificateOrder {
  std::string common_name;
  std::string unit;  // OU; may be empty
  std::string role;  // as CertificateInfo::role(); may be empty
  std::vector<std::string> addresses;   // numeric ones and host names
  bool for_server = true, for_client = false;
  int64_t not_before = 0, not_after = 0;  // seconds since 1970
};

struct Revocation {
  std::string serial;  // hexadecimal
  int64_t when = 0;    // seconds since 1970
};

// An authority: a certificate that may sign, and its key.
class Authority {
 public:
  [[nodiscard]] static Authority create(const std::string& common_name, PrivateKey key,
                                        int64_t not_before, int64_t not_after);
  // Throws Error(kFailedPrecondition) if the key is not that of the certificate, or it is none of
  // an authority.
  Authority(Certificate certificate, PrivateKey key);

  [[nodiscard]] const Certificate& certificate() const { return certificate_; }
  [[nodiscard]] const PrivateKey& key() const { return key_; }
  [[nodiscard]] Certificate issue(const CertificateOrder& order, const PrivateKey& key) const;
  // A revocation list as PEM. `number` must rise from list to list.
  [[nodiscard]] std::string revocation_list(const std::vector<Revocation>& revoked,
                                            int64_t number, int64_t this_update,
                                            int64_t next_update) const;

 private:
  Certificate certificate_;
  PrivateKey key_;
};

// What a revocation list says.
struct RevocationList {
  std::string issuer;
  int64_t number = 0;
  int64_t this_update = 0, next_update = 0;  // seconds since 1970; 0: none given
  std::vector<Revocation> revoked;
};
// Throws Error(kInvalidArgument).
[[nodiscard]] RevocationList read_revocation_list(std::string_view pem, const std::string& where);

}  // namespace phalanx::net
