#include "phalanx/net/certificate.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <openssl/pem.h>

#include <algorithm>
#include <cstring>
#include <ctime>

#include "phalanx/base/check.h"
#include "phalanx/base/error.h"
#include "phalanx/net/address.h"
#include "phalanx/net/openssl_handles.h"

namespace phalanx::net {
namespace {

constexpr size_t kMostCertificates = 16;  // in one file

std::string name_text(const X509_NAME* name) {
  const BioPtr bio(BIO_new(BIO_s_mem()));
  X509_NAME_print_ex(bio.get(), name, 0, XN_FLAG_RFC2253);
  return bio_text(bio.get());
}

int64_t unix_time(const ASN1_TIME* time) {
  std::tm parts{};
  if (time == nullptr || ASN1_TIME_to_tm(time, &parts) != 1) return 0;
  return ::timegm(&parts);
}

std::string hex(const unsigned char* bytes, size_t size) {
  std::string text;
  for (size_t i = 0; i < size; ++i) text += fmt::format("{:02x}", bytes[i]);
  return text;
}

void read_key(EVP_PKEY* key, CertificateInfo& info) {
  if (key == nullptr) {
    info.key_type = "unknown";
    return;
  }
  const int bits = EVP_PKEY_get_bits(key);
  switch (EVP_PKEY_get_base_id(key)) {
    case EVP_PKEY_RSA:
    case EVP_PKEY_RSA_PSS:
      info.key_type = fmt::format("RSA {}", bits);
      info.strong_key = bits >= 3072;
      break;
    case EVP_PKEY_EC: {
      char group[80] = "";
      EVP_PKEY_get_group_name(key, group, sizeof group, nullptr);
      const std::string_view name = group;
      info.key_type = "EC " + std::string(name == "prime256v1"  ? "P-256"
                                          : name == "secp384r1" ? "P-384"
                                          : name == "secp521r1" ? "P-521"
                                                                : name);
      info.strong_key = bits >= 256;
      break;
    }
    case EVP_PKEY_ED25519:
      info.key_type = "Ed25519";
      info.strong_key = true;
      break;
    case EVP_PKEY_ED448:
      info.key_type = "Ed448";
      info.strong_key = true;
      break;
    default: {
      const char* name = EVP_PKEY_get0_type_name(key);
      info.key_type = fmt::format("{} {}", name != nullptr ? name : "unknown", bits);
    }
  }
}

void read_names(X509* x509, CertificateInfo& info) {
  auto* names = static_cast<GENERAL_NAMES*>(
      X509_get_ext_d2i(x509, NID_subject_alt_name, nullptr, nullptr));
  for (int i = 0; i < sk_GENERAL_NAME_num(names); ++i) {
    const GENERAL_NAME* name = sk_GENERAL_NAME_value(names, i);
    if (name->type == GEN_DNS || name->type == GEN_URI) {
      const ASN1_STRING* text = name->type == GEN_DNS ? name->d.dNSName
                                                      : name->d.uniformResourceIdentifier;
      auto& list = name->type == GEN_DNS ? info.host_names : info.uris;
      list.emplace_back(reinterpret_cast<const char*>(ASN1_STRING_get0_data(text)),
                        static_cast<size_t>(ASN1_STRING_length(text)));
    } else if (name->type == GEN_IPADD) {
      const int size = ASN1_STRING_length(name->d.iPAddress);
      char text[INET6_ADDRSTRLEN];
      if ((size == 4 || size == 16) &&
          ::inet_ntop(size == 4 ? AF_INET : AF_INET6, ASN1_STRING_get0_data(name->d.iPAddress),
                      text, sizeof text) != nullptr)
        info.addresses.emplace_back(text);
    }
  }
  GENERAL_NAMES_free(names);
}

CertificateInfo read_info(X509* x509) {
  CertificateInfo info;
  info.subject = name_text(X509_get_subject_name(x509));
  info.issuer = name_text(X509_get_issuer_name(x509));
  BIGNUM* serial = ASN1_INTEGER_to_BN(X509_get0_serialNumber(x509), nullptr);
  if (char* text = serial != nullptr ? BN_bn2hex(serial) : nullptr) {
    info.serial = text;
    OPENSSL_free(text);
  }
  BN_free(serial);
  read_names(x509, info);
  info.not_before = unix_time(X509_get0_notBefore(x509));
  info.not_after = unix_time(X509_get0_notAfter(x509));
  read_key(X509_get0_pubkey(x509), info);
  info.authority = X509_check_ca(x509) == 1;
  const uint32_t flags = X509_get_extension_flags(x509);
  const uint32_t usage = X509_get_extended_key_usage(x509);  // all bits if there is none
  const bool limited = (flags & EXFLAG_XKUSAGE) != 0;
  info.for_server = !limited || (usage & XKU_SSL_SERVER) != 0 || (usage & XKU_ANYEKU) != 0;
  info.for_client = !limited || (usage & XKU_SSL_CLIENT) != 0 || (usage & XKU_ANYEKU) != 0;
  info.version = static_cast<int>(X509_get_version(x509)) + 1;
  info.signature = OBJ_nid2ln(X509_get_signature_nid(x509));
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  PHALANX_CHECK(X509_digest(x509, EVP_sha256(), digest, &size) == 1);
  info.fingerprint = hex(digest, size);
  ERR_clear_error();
  return info;
}

}  // namespace

bool CertificateInfo::names(std::string_view address_or_host) const {
  const auto same = [&](const std::string& own) { return same_address(own, address_or_host); };
  return std::any_of(addresses.begin(), addresses.end(), same) ||
         std::any_of(host_names.begin(), host_names.end(), same);
}

std::string CertificateInfo::role() const {
  for (const std::string& uri : uris)
    if (uri.starts_with(kRoleUri)) return uri.substr(kRoleUri.size());
  return {};
}

std::string time_text(int64_t unix_seconds) {
  const std::time_t time = unix_seconds;
  std::tm parts{};
  char text[40];
  ::gmtime_r(&time, &parts);
  return {text, std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S UTC", &parts)};
}

std::vector<Certificate> Certificate::parse(std::string_view pem, const std::string& where) {
  std::vector<Certificate> found;
  const BioPtr bio = memory_bio(pem);
  ERR_clear_error();
  for (;;) {
    const X509Ptr x509(PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr));
    if (!x509) {
      const unsigned long error = ERR_peek_last_error();
      const bool at_end = ERR_GET_LIB(error) == ERR_LIB_PEM &&
                          ERR_GET_REASON(error) == PEM_R_NO_START_LINE;
      const std::string reason = take_openssl_error();
      if (at_end && !found.empty()) return found;
      throw Error(Code::kInvalidArgument,
                  fmt::format("{}: {}, found {} bytes, expected a PEM file with BEGIN "
                              "CERTIFICATE. Fix: export the certificate again as PEM",
                              where, at_end ? "no certificate" : "broken certificate: " + reason,
                              pem.size()));
    }
    if (found.size() == kMostCertificates)
      throw Error(Code::kInvalidArgument,
                  fmt::format("{}: more than {} certificates", where, kMostCertificates));
    found.emplace_back(x509.get());
  }
}

Certificate::Certificate(x509_st* certificate) {
  X509_up_ref(certificate);
  x509_.reset(certificate, X509_free);
  info_ = std::make_shared<const CertificateInfo>(read_info(certificate));
}

std::string Certificate::pem() const {
  const BioPtr bio(BIO_new(BIO_s_mem()));
  PHALANX_CHECK(PEM_write_bio_X509(bio.get(), x509_.get()) == 1);
  return bio_text(bio.get());
}

}  // namespace phalanx::net
