#include "phalanx/net/peer_verifier.h"

#include <fmt/format.h>
#include <openssl/pem.h>
#include <sys/stat.h>

#include <ctime>

#include "phalanx/base/check.h"
#include "phalanx/net/openssl_handles.h"
#include "phalanx/net/security_file.h"

namespace phalanx::net {
namespace {

constexpr int kMostIntermediates = 4;

std::string days(int64_t seconds) {
  const int64_t days = seconds / 86400;
  return days == 1 ? "1 day" : fmt::format("{} days", days);
}

int64_t unix_time(const ASN1_TIME* time) {
  std::tm parts{};
  if (time == nullptr || ASN1_TIME_to_tm(time, &parts) != 1) return 0;
  return ::timegm(&parts);
}

std::string authorities_text(const PeerVerifier::Options& options) {
  std::string text;
  for (const Certificate& authority : options.authorities)
    text += (text.empty() ? "" : "; ") + authority.info().subject;
  return fmt::format("{} of {}", text.empty() ? "none" : text,
                     fmt::join(options.authority_files, ", "));
}

// The words for OpenSSL's verdict on `bad`, which is chain[0] or an authority above it.
Problem explain(int error, const CertificateInfo& bad, Usage usage,
                const PeerVerifier::Options& options, const std::string& where) {
  const int64_t now = std::time(nullptr);
  Problem p{.where = fmt::format("{}, {}", where, who(bad))};
  switch (error) {
    case X509_V_ERR_CERT_HAS_EXPIRED:
      p.what = "certificate has expired";
      p.found = fmt::format("valid until {}, {} ago", time_text(bad.not_after),
                            days(now - bad.not_after));
      p.expected = "one that is valid now, " + time_text(now);
      p.fix = "phalanx certs renew, or a new certificate of your authority";
      return p;
    case X509_V_ERR_CERT_NOT_YET_VALID:
      p.what = "certificate is not yet valid";
      p.found = fmt::format("valid from {}, in {}", time_text(bad.not_before),
                            days(bad.not_before - now));
      p.expected = "one that is valid now, " + time_text(now);
      p.fix = "set the clocks of the machines, or wait, or phalanx certs renew";
      return p;
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
    case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
    case X509_V_ERR_CERT_SIGNATURE_FAILURE:
    case X509_V_ERR_AKID_SKID_MISMATCH:
    case X509_V_ERR_AKID_ISSUER_SERIAL_MISMATCH:
    case X509_V_ERR_CERT_UNTRUSTED:
      p.what = error == X509_V_ERR_CERT_SIGNATURE_FAILURE
                   ? "certificate was signed by another authority of the same name"
                   : "certificate was signed by another authority";
      p.found = "issuer " + bad.issuer;
      p.expected = authorities_text(options);
      p.fix = "use certificates of one authority everywhere, or add this issuer's certificate to "
              "the list of authorities";
      return p;
    case X509_V_ERR_INVALID_PURPOSE:
    case X509_V_ERR_INVALID_CA:
    case X509_V_ERR_KEYUSAGE_NO_CERTSIGN:
      if (error != X509_V_ERR_INVALID_PURPOSE || bad.authority) {
        p.what = "certificate of the issuer is not one of an authority";
        p.found = "no usage 'Certificate Sign'";
        p.fix = "have it signed by a true authority";
        return p;
      }
      p.what = usage == Usage::kServer ? "certificate may not be used by a server"
                                       : "certificate may not be used by a client";
      p.found = fmt::format("extended key usage {}", bad.for_server   ? "serverAuth only"
                                                     : bad.for_client ? "clientAuth only"
                                                                      : "without TLS");
      p.expected = usage == Usage::kServer ? "serverAuth" : "clientAuth";
      p.fix = "use the certificate that was made for this purpose";
      return p;
    case X509_V_ERR_CERT_REVOKED:
      p.what = "certificate was revoked";
      p.found = "serial " + bad.serial + " in the revocation list";
      p.expected = "one that is not revoked";
      p.fix = "phalanx certs renew gives the node another one";
      return p;
    case X509_V_ERR_UNABLE_TO_GET_CRL:
    case X509_V_ERR_UNABLE_TO_GET_CRL_ISSUER:
    case X509_V_ERR_DIFFERENT_CRL_SCOPE:
      p.what = "no revocation list of the certificate's issuer";
      p.found = fmt::format("{}", fmt::join(options.crl_files, ", "));
      p.expected = "a list of " + bad.issuer;
      p.fix = "add the list of this authority, or configure none";
      return p;
    case X509_V_ERR_CRL_HAS_EXPIRED:
    case X509_V_ERR_CRL_NOT_YET_VALID:
      p.what = error == X509_V_ERR_CRL_HAS_EXPIRED ? "revocation list has expired"
                                                   : "revocation list is not yet valid";
      p.where = fmt::format("{}", fmt::join(options.crl_files, ", "));
      p.found = "list of " + bad.issuer;
      p.expected = "one that is valid now, " + time_text(now);
      p.fix = "phalanx certs revoke --refresh, or fetch the authority's new list";
      return p;
    case X509_V_ERR_CRL_SIGNATURE_FAILURE:
      p.what = "revocation list has a wrong signature";
      p.where = fmt::format("{}", fmt::join(options.crl_files, ", "));
      p.expected = "one signed by " + bad.issuer;
      p.fix = "fetch the list again";
      return p;
    case X509_V_ERR_CERT_CHAIN_TOO_LONG:
      p.what = "certificate has too many authorities above it";
      p.expected = fmt::format("at most {}", kMostIntermediates);
      return p;
    default:
      p.what = fmt::format("certificate is not accepted: {}", X509_verify_cert_error_string(error));
      p.expected = "a valid certificate of " + authorities_text(options);
      return p;
  }
}

std::optional<Problem> weak_key(const CertificateInfo& info, const std::string& where) {
  if (info.strong_key) return std::nullopt;
  return Problem{.what = "certificate has a weak key",
                 .where = fmt::format("{}, {}", where, who(info)),
                 .found = info.key_type,
                 .expected = "RSA of 3072 bits or more, EC of 256 or more, Ed25519 or Ed448",
                 .fix = "make a new key and certificate"};
}

}  // namespace

std::optional<Problem> plain_problem(const CertificateInfo& info, const std::string& where) {
  const int64_t now = std::time(nullptr);
  if (now > info.not_after)
    return explain(X509_V_ERR_CERT_HAS_EXPIRED, info, Usage::kServer, {}, where);
  if (now < info.not_before)
    return explain(X509_V_ERR_CERT_NOT_YET_VALID, info, Usage::kServer, {}, where);
  return weak_key(info, where);
}

std::string who(const CertificateInfo& info) {
  return fmt::format("{} (serial {})", info.subject, info.serial);
}

PeerVerifier::PeerVerifier(Options options) : options_(std::move(options)) {}

std::vector<PeerVerifier::Crl> PeerVerifier::lists(std::optional<Problem>& problem) const {
  const std::lock_guard lock(mutex_);
  std::vector<Crl> all;
  for (const std::string& path : options_.crl_files) {
    List& list = cache_[path];
    struct stat st {};
    const bool exists = ::stat(path.c_str(), &st) == 0;
    const int64_t modified = st.st_mtim.tv_sec * 1'000'000'000LL + st.st_mtim.tv_nsec;
    if (!exists || modified != list.modified_ns || st.st_size != list.size ||
        st.st_ino != list.inode) {
      list = {};
      Problems problems;
      Problems warnings;
      const std::string pem = read_security_file(path, problems, warnings);
      if (!problems.empty()) {
        problem = problems.list().front();
        problem->what = "revocation list is not readable: " + problem->what;
        return {};
      }
      const BioPtr bio = memory_bio(pem);
      while (CrlPtr crl{PEM_read_bio_X509_CRL(bio.get(), nullptr, nullptr, nullptr)})
        list.crls.emplace_back(crl.release(), X509_CRL_free);
      const unsigned long error = ERR_peek_last_error();
      const bool at_end = ERR_GET_LIB(error) == ERR_LIB_PEM &&
                          ERR_GET_REASON(error) == PEM_R_NO_START_LINE;
      const std::string reason = take_openssl_error();
      if (list.crls.empty() || !at_end) {
        list = {};
        problem = Problem{.what = "revocation list is broken",
                          .where = path,
                          .found = at_end ? "no BEGIN X509 CRL" : reason,
                          .expected = "a PEM file with BEGIN X509 CRL",
                          .fix = "phalanx certs revoke --refresh, or fetch the list again"};
        return {};
      }
      list.modified_ns = modified;
      list.size = st.st_size;
      list.inode = st.st_ino;
    }
    all.insert(all.end(), list.crls.begin(), list.crls.end());
  }
  return all;
}

std::optional<Problem> PeerVerifier::problem(std::span<const Certificate> chain, Usage usage,
                                             const std::string& where) const {
  PHALANX_CHECK(!chain.empty());
  std::optional<Problem> unusable;
  const std::vector<Crl> crls = lists(unusable);
  if (unusable) return unusable;

  const StorePtr store(X509_STORE_new());
  for (const Certificate& authority : options_.authorities)
    X509_STORE_add_cert(store.get(), authority.native());
  for (const Crl& crl : crls) X509_STORE_add_crl(store.get(), crl.get());
  if (!options_.crl_files.empty())
    X509_STORE_set_flags(store.get(), X509_V_FLAG_CRL_CHECK | X509_V_FLAG_CRL_CHECK_ALL);

  STACK_OF(X509)* others = sk_X509_new_null();
  for (const Certificate& certificate : chain.subspan(1))
    sk_X509_push(others, certificate.native());
  const StoreContextPtr context(X509_STORE_CTX_new());
  PHALANX_CHECK(X509_STORE_CTX_init(context.get(), store.get(), chain[0].native(), others) == 1);
  X509_STORE_CTX_set_depth(context.get(), kMostIntermediates);
  X509_STORE_CTX_set_purpose(context.get(), usage == Usage::kServer ? X509_PURPOSE_SSL_SERVER
                                                                    : X509_PURPOSE_SSL_CLIENT);
  const bool good = X509_verify_cert(context.get()) == 1;
  const int error = X509_STORE_CTX_get_error(context.get());
  X509* const bad = X509_STORE_CTX_get_current_cert(context.get());
  const CertificateInfo info =
      bad != nullptr ? Certificate(bad).info() : chain[0].info();
  STACK_OF(X509)* verified = good ? X509_STORE_CTX_get0_chain(context.get()) : nullptr;
  std::optional<Problem> found;
  if (!good) found = explain(error, info, usage, options_, where);
  for (int i = 0; !found && i < sk_X509_num(verified); ++i)
    found = weak_key(Certificate(sk_X509_value(verified, i)).info(), where);
  sk_X509_free(others);
  ERR_clear_error();
  return found;
}

void PeerVerifier::check_lists(Problems& problems) const {
  std::optional<Problem> unusable;
  const std::vector<Crl> crls = lists(unusable);
  if (unusable) return problems.add(*unusable);
  const std::string files = fmt::format("{}", fmt::join(options_.crl_files, ", "));
  const int64_t now = std::time(nullptr);
  for (const Crl& crl : crls) {
    const BioPtr name(BIO_new(BIO_s_mem()));
    X509_NAME_print_ex(name.get(), X509_CRL_get_issuer(crl.get()), 0, XN_FLAG_RFC2253);
    const std::string issuer = bio_text(name.get());
    bool signed_by_us = false;
    for (const Certificate& authority : options_.authorities)
      signed_by_us = signed_by_us ||
                     X509_CRL_verify(crl.get(), X509_get0_pubkey(authority.native())) == 1;
    ERR_clear_error();
    if (!signed_by_us)
      problems.add({.what = "revocation list was signed by another authority",
                    .where = files,
                    .found = "issuer " + issuer,
                    .expected = authorities_text(options_),
                    .fix = "name the list of your authority"});
    const int64_t next = unix_time(X509_CRL_get0_nextUpdate(crl.get()));
    if (next != 0 && next < now)
      problems.add({.what = "revocation list has expired",
                    .where = files,
                    .found = fmt::format("valid until {}, {} ago", time_text(next),
                                         days(now - next)),
                    .expected = "one that is valid now, " + time_text(now),
                    .fix = "phalanx certs revoke --refresh, or fetch the authority's new list"});
  }
}

}  // namespace phalanx::net
