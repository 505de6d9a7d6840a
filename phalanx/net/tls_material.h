#pragma once

#include <memory>
#include <string>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/net/authority.h"
#include "phalanx/net/certificate.h"
#include "phalanx/net/password_file.h"
#include "phalanx/net/peer_verifier.h"
#include "phalanx/net/secret.h"

struct evp_pkey_st;  // OpenSSL's EVP_PKEY

namespace phalanx::net {

// The files of one plane.
struct TlsFiles {
  std::string plane;        // for messages: "between nodes", "business", "metrics"
  std::string certificate;  // PEM, own first; intermediate authorities may follow
  std::string key;          // PEM, may be encrypted
  std::string key_password;  // password file (password_file.h); read only if the key is encrypted
  KeyStore key_store;
  std::vector<std::string> authorities;  // PEM files; empty: peers are not asked for certificates
  std::vector<std::string> crls;         // PEM files; empty: no revocation
};

// What a plane needs of its own certificate.
struct TlsNeeds {
  bool server = true;
  bool client = false;
  std::vector<std::string> addresses;  // each must be among the subject alternative names
  std::string role;  // what role() must be, unless it is empty (certificates of other authorities)
  std::string fix;   // command that makes a right certificate, for messages about names and roles
};

// Certificate, key, authorities and revocation lists of a plane, read and checked. Immutable; a
// renewed certificate is another TlsMaterial.
class TlsMaterial {
 public:
  // Null if a problem was added. All problems are looked for, each with its own sentence.
  [[nodiscard]] static std::shared_ptr<const TlsMaterial> load(const TlsFiles& files,
                                                               const TlsNeeds& needs,
                                                               Problems& problems,
                                                               Problems& warnings);

  // From memory, without files, checks and revocation lists. For benches.
  [[nodiscard]] static std::shared_ptr<const TlsMaterial> of(const Certificate& certificate,
                                                             const PrivateKey& key,
                                                             std::vector<Certificate> authorities);

  [[nodiscard]] const TlsFiles& files() const { return files_; }
  [[nodiscard]] const std::vector<Certificate>& chain() const { return chain_; }
  [[nodiscard]] const CertificateInfo& own() const { return chain_[0].info(); }
  [[nodiscard]] const PeerVerifier& verifier() const { return *verifier_; }
  [[nodiscard]] evp_pkey_st* native_key() const { return key_.get(); }

  // PEM texts for libraries that take nothing else; the key unencrypted.
  [[nodiscard]] std::string chain_pem() const;
  [[nodiscard]] std::string authorities_pem() const;
  [[nodiscard]] Secret key_pem() const;

 private:
  TlsMaterial() = default;

  TlsFiles files_;
  std::vector<Certificate> chain_;
  std::shared_ptr<evp_pkey_st> key_;
  std::unique_ptr<PeerVerifier> verifier_;
};

// Whether a certificate is of the node at `address` and of `role` (may be empty): a sentence that
// says what it is instead, or nothing. A certificate without a role of Phalanx passes any.
[[nodiscard]] std::optional<Problem> identity_problem(const CertificateInfo& info,
                                                      const std::vector<std::string>& addresses,
                                                      const std::string& role,
                                                      const std::string& where);

}  // namespace phalanx::net
