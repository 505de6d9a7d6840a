#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

struct x509_st;  // OpenSSL's X509

namespace phalanx::net {

// What a certificate says.
struct CertificateInfo {
  std::string subject;  // "CN=10.0.0.1,OU=inter-node,O=Phalanx"
  std::string issuer;
  std::string serial;                    // hexadecimal
  std::vector<std::string> addresses;    // subject alternative names: IP, canonical
  std::vector<std::string> host_names;   // DNS
  std::vector<std::string> uris;
  int64_t not_before = 0, not_after = 0;  // seconds since 1970
  std::string key_type;                   // "RSA 3072", "EC P-256"
  bool strong_key = false;                // RSA >= 3072 bits, EC >= 256, Ed25519, Ed448
  bool authority = false;                 // may sign certificates
  bool for_server = false, for_client = false;  // extended key usage; both if it has none
  int version = 0;                        // of X.509; 3 is the usual one
  std::string signature;                  // algorithm: "ecdsa-with-SHA256"
  std::string fingerprint;                // SHA-256 of the whole, lower-case hexadecimal

  // Whether a subject alternative name is this address (any spelling) or host name.
  [[nodiscard]] bool names(std::string_view address_or_host) const;
  // What Phalanx's own authority wrote ("inter-node:master", "service"), empty for certificates of
  // others: the rest of the URI that begins with kRoleUri.
  [[nodiscard]] std::string role() const;
};
inline constexpr std::string_view kRoleUri = "urn:phalanx:role:";

// "2027-11-22 21:15:00 UTC".
[[nodiscard]] std::string time_text(int64_t unix_seconds);

// An X.509 certificate. Cheap to copy.
class Certificate {
 public:
  // All certificates of a PEM text, at least one, at most 16. Throws Error(kInvalidArgument) that
  // names `where`.
  [[nodiscard]] static std::vector<Certificate> parse(std::string_view pem,
                                                      const std::string& where);
  // Shares the object. Not null.
  explicit Certificate(x509_st* certificate);

  [[nodiscard]] const CertificateInfo& info() const { return *info_; }
  [[nodiscard]] std::string pem() const;
  [[nodiscard]] x509_st* native() const { return x509_.get(); }

 private:
  std::shared_ptr<x509_st> x509_;
  std::shared_ptr<const CertificateInfo> info_;
};

}  // namespace phalanx::net
