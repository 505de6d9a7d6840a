#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/net/certificate.h"

struct X509_crl_st;  // OpenSSL's X509_CRL

namespace phalanx::net {

enum class Usage { kServer, kClient };  // what the holder of a certificate does with it

// Judges certificates against authorities and revocation lists: chain, dates, usage, strength,
// revocation. Lists are read again when their file has changed, so a revocation needs no restart.
// Thread-safe.
class PeerVerifier {
 public:
  struct Options {
    std::vector<Certificate> authorities;
    std::vector<std::string> authority_files;  // for messages
    std::vector<std::string> crl_files;        // none: nothing is looked up
  };
  explicit PeerVerifier(Options options);

  // Nothing if the holder of chain[0] may be trusted for `usage`; the rest of `chain` may serve as
  // intermediate authorities. `where` says what is judged: a file, or "certificate of the peer".
  [[nodiscard]] std::optional<Problem> problem(std::span<const Certificate> chain, Usage usage,
                                               const std::string& where) const;

  // Reads the lists now: unreadable, broken, expired, or of nobody's authority.
  void check_lists(Problems& problems) const;

  [[nodiscard]] const Options& options() const { return options_; }

 private:
  using Crl = std::shared_ptr<X509_crl_st>;
  struct List {
    int64_t modified_ns = -1, size = -1;
    uint64_t inode = 0;
    std::vector<Crl> crls;
  };
  // All lists as they are on disk, or the problem of the first that cannot be used.
  [[nodiscard]] std::vector<Crl> lists(std::optional<Problem>& problem) const;

  Options options_;
  mutable std::mutex mutex_;
  mutable std::map<std::string, List> cache_;  // guarded by mutex_
};

// Dates and strength alone.
[[nodiscard]] std::optional<Problem> plain_problem(const CertificateInfo& info,
                                                   const std::string& where);

// "CN=10.0.0.2,O=Phalanx (serial 1A)".
[[nodiscard]] std::string who(const CertificateInfo& info);

}  // namespace phalanx::net
