#include "phalanx/net/authority.h"

#include <fmt/format.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/rsa.h>

#include <cstring>
#include <ctime>

#include "phalanx/base/check.h"
#include "phalanx/base/error.h"
#include "phalanx/net/address.h"
#include "phalanx/net/openssl_handles.h"

namespace phalanx::net {
namespace {

constexpr int kSerialBytes = 16;

void add_name(X509_NAME* name, const char* field, const std::string& text) {
  if (text.empty()) return;
  PHALANX_CHECK(X509_NAME_add_entry_by_txt(name, field, MBSTRING_UTF8,
                                           reinterpret_cast<const unsigned char*>(text.data()),
                                           static_cast<int>(text.size()), -1, 0) == 1);
}

void add_extension(X509* x509, X509* issuer, int nid, const std::string& value) {
  X509V3_CTX context;
  X509V3_set_ctx_nodb(&context);
  X509V3_set_ctx(&context, issuer, x509, nullptr, nullptr, 0);
  const ExtensionPtr extension(X509V3_EXT_conf_nid(nullptr, &context, nid, value.c_str()));
  PHALANX_CHECK(extension != nullptr);
  PHALANX_CHECK(X509_add_ext(x509, extension.get(), -1) == 1);
}

// A certificate without extensions, to be signed.
X509Ptr blank(const PrivateKey& key, int64_t not_before, int64_t not_after) {
  X509Ptr x509(X509_new());
  unsigned char serial[kSerialBytes];
  PHALANX_CHECK(RAND_bytes(serial, sizeof serial) == 1);
  serial[0] = static_cast<unsigned char>((serial[0] & 0x3f) | 0x40);  // positive, of full length
  BIGNUM* number = BN_bin2bn(serial, sizeof serial, nullptr);
  PHALANX_CHECK(BN_to_ASN1_INTEGER(number, X509_get_serialNumber(x509.get())) != nullptr);
  BN_free(number);
  PHALANX_CHECK(X509_set_version(x509.get(), X509_VERSION_3) == 1);
  PHALANX_CHECK(ASN1_TIME_set(X509_getm_notBefore(x509.get()), not_before) != nullptr);
  PHALANX_CHECK(ASN1_TIME_set(X509_getm_notAfter(x509.get()), not_after) != nullptr);
  PHALANX_CHECK(X509_set_pubkey(x509.get(), key.native()) == 1);
  return x509;
}

int64_t unix_time(const ASN1_TIME* time) {
  std::tm parts{};
  if (time == nullptr || ASN1_TIME_to_tm(time, &parts) != 1) return 0;
  return ::timegm(&parts);
}

int give_password(char* buffer, int size, int, void* user) {
  const auto* password = static_cast<std::string_view*>(user);
  if (password->size() > static_cast<size_t>(size)) return -1;
  std::memcpy(buffer, password->data(), password->size());
  return static_cast<int>(password->size());
}

}  // namespace

PrivateKey::PrivateKey(evp_pkey_st* key) : key_(key, EVP_PKEY_free) {}

PrivateKey PrivateKey::make(Kind kind, int rsa_bits) {
  EVP_PKEY* key = kind == Kind::kRsa ? EVP_RSA_gen(static_cast<unsigned>(rsa_bits))
                                     : EVP_EC_gen("P-256");
  PHALANX_CHECK(key != nullptr);
  return PrivateKey(key);
}

PrivateKey PrivateKey::parse(std::string_view pem, std::string_view password,
                             const std::string& where) {
  const BioPtr bio = memory_bio(pem);
  ERR_clear_error();
  EVP_PKEY* key = PEM_read_bio_PrivateKey(bio.get(), nullptr, give_password, &password);
  const std::string reason = take_openssl_error();
  if (key == nullptr) {
    const bool encrypted = pem.find("ENCRYPTED") != std::string_view::npos;
    throw Error(Code::kInvalidArgument,
                encrypted ? where + ": the password of the private key is wrong"
                          : fmt::format("{}: broken private key: {}", where, reason));
  }
  return PrivateKey(key);
}

Secret PrivateKey::pem(std::string_view password) const {
  const BioPtr bio(BIO_new(BIO_s_secmem()));
  PHALANX_CHECK(PEM_write_bio_PKCS8PrivateKey(
                    bio.get(), key_.get(), password.empty() ? nullptr : EVP_aes_256_cbc(),
                    password.data(), static_cast<int>(password.size()), nullptr, nullptr) == 1);
  char* data = nullptr;
  const long size = BIO_get_mem_data(bio.get(), &data);
  return Secret(std::string_view(data, static_cast<size_t>(size)));
}

bool matches(const Certificate& certificate, const PrivateKey& key) {
  const bool same = X509_check_private_key(certificate.native(), key.native()) == 1;
  ERR_clear_error();
  return same;
}

Authority Authority::create(const std::string& common_name, PrivateKey key, int64_t not_before,
                            int64_t not_after) {
  const X509Ptr x509 = blank(key, not_before, not_after);
  X509_NAME* const name = X509_get_subject_name(x509.get());
  add_name(name, "O", "Phalanx");
  add_name(name, "CN", common_name);
  PHALANX_CHECK(X509_set_issuer_name(x509.get(), name) == 1);
  add_extension(x509.get(), x509.get(), NID_basic_constraints, "critical,CA:TRUE,pathlen:0");
  add_extension(x509.get(), x509.get(), NID_key_usage, "critical,keyCertSign,cRLSign");
  add_extension(x509.get(), x509.get(), NID_subject_key_identifier, "hash");
  PHALANX_CHECK(X509_sign(x509.get(), key.native(), EVP_sha256()) > 0);
  return {Certificate(x509.get()), std::move(key)};
}

Authority::Authority(Certificate certificate, PrivateKey key)
    : certificate_(std::move(certificate)), key_(std::move(key)) {
  if (!certificate_.info().authority)
    throw Error(Code::kFailedPrecondition,
                certificate_.info().subject + " is not the certificate of an authority");
  if (!matches(certificate_, key_))
    throw Error(Code::kFailedPrecondition,
                "the authority's key does not match its certificate " +
                    certificate_.info().subject);
}

Certificate Authority::issue(const CertificateOrder& order, const PrivateKey& key) const {
  const X509Ptr x509 = blank(key, order.not_before, order.not_after);
  X509_NAME* const name = X509_get_subject_name(x509.get());
  add_name(name, "O", "Phalanx");
  add_name(name, "OU", order.unit);
  add_name(name, "CN", order.common_name);
  X509* const issuer = certificate_.native();
  PHALANX_CHECK(X509_set_issuer_name(x509.get(), X509_get_subject_name(issuer)) == 1);
  add_extension(x509.get(), issuer, NID_basic_constraints, "critical,CA:FALSE");
  add_extension(x509.get(), issuer, NID_key_usage, "critical,digitalSignature");
  add_extension(x509.get(), issuer, NID_ext_key_usage,
                order.for_server && order.for_client ? "serverAuth,clientAuth"
                : order.for_server                   ? "serverAuth"
                                                     : "clientAuth");
  std::string names;
  for (const std::string& address : order.addresses) {
    const auto numeric = Address::parse(address);
    names += fmt::format("{}{}:{}", names.empty() ? "" : ",", numeric ? "IP" : "DNS",
                         numeric ? numeric->text() : address);
  }
  if (!order.role.empty())
    names += fmt::format("{}URI:{}{}", names.empty() ? "" : ",", kRoleUri, order.role);
  if (!names.empty()) add_extension(x509.get(), issuer, NID_subject_alt_name, names);
  add_extension(x509.get(), issuer, NID_subject_key_identifier, "hash");
  add_extension(x509.get(), issuer, NID_authority_key_identifier, "keyid");
  PHALANX_CHECK(X509_sign(x509.get(), key_.native(), EVP_sha256()) > 0);
  return Certificate(x509.get());
}

std::string Authority::revocation_list(const std::vector<Revocation>& revoked, int64_t number,
                                       int64_t this_update, int64_t next_update) const {
  const CrlPtr crl(X509_CRL_new());
  PHALANX_CHECK(X509_CRL_set_version(crl.get(), X509_CRL_VERSION_2) == 1);
  PHALANX_CHECK(X509_CRL_set_issuer_name(
                    crl.get(), X509_get_subject_name(certificate_.native())) == 1);
  ASN1_TIME* time = ASN1_TIME_new();
  PHALANX_CHECK(ASN1_TIME_set(time, this_update) != nullptr);
  PHALANX_CHECK(X509_CRL_set1_lastUpdate(crl.get(), time) == 1);
  PHALANX_CHECK(ASN1_TIME_set(time, next_update) != nullptr);
  PHALANX_CHECK(X509_CRL_set1_nextUpdate(crl.get(), time) == 1);
  for (const Revocation& one : revoked) {
    X509_REVOKED* entry = X509_REVOKED_new();
    BIGNUM* serial = nullptr;
    PHALANX_CHECK(BN_hex2bn(&serial, one.serial.c_str()) == static_cast<int>(one.serial.size()));
    ASN1_INTEGER* integer = BN_to_ASN1_INTEGER(serial, nullptr);
    PHALANX_CHECK(X509_REVOKED_set_serialNumber(entry, integer) == 1);
    PHALANX_CHECK(ASN1_TIME_set(time, one.when) != nullptr);
    PHALANX_CHECK(X509_REVOKED_set_revocationDate(entry, time) == 1);
    PHALANX_CHECK(X509_CRL_add0_revoked(crl.get(), entry) == 1);
    ASN1_INTEGER_free(integer);
    BN_free(serial);
  }
  ASN1_TIME_free(time);
  X509_CRL_sort(crl.get());
  ASN1_INTEGER* integer = ASN1_INTEGER_new();
  PHALANX_CHECK(ASN1_INTEGER_set_int64(integer, number) == 1);
  PHALANX_CHECK(X509_CRL_add1_ext_i2d(crl.get(), NID_crl_number, integer, 0, 0) == 1);
  ASN1_INTEGER_free(integer);
  X509V3_CTX context;
  X509V3_set_ctx_nodb(&context);
  X509V3_set_ctx(&context, certificate_.native(), nullptr, nullptr, crl.get(), 0);
  const ExtensionPtr issuer(
      X509V3_EXT_conf_nid(nullptr, &context, NID_authority_key_identifier, "keyid"));
  PHALANX_CHECK(issuer != nullptr && X509_CRL_add_ext(crl.get(), issuer.get(), -1) == 1);
  PHALANX_CHECK(X509_CRL_sign(crl.get(), key_.native(), EVP_sha256()) > 0);
  const BioPtr bio(BIO_new(BIO_s_mem()));
  PHALANX_CHECK(PEM_write_bio_X509_CRL(bio.get(), crl.get()) == 1);
  return bio_text(bio.get());
}

RevocationList read_revocation_list(std::string_view pem, const std::string& where) {
  const BioPtr bio = memory_bio(pem);
  ERR_clear_error();
  const CrlPtr crl(PEM_read_bio_X509_CRL(bio.get(), nullptr, nullptr, nullptr));
  if (!crl)
    throw Error(Code::kInvalidArgument,
                fmt::format("{}: broken revocation list: {}, expected a PEM file with BEGIN X509 "
                            "CRL",
                            where, take_openssl_error()));
  RevocationList list;
  const BioPtr name(BIO_new(BIO_s_mem()));
  X509_NAME_print_ex(name.get(), X509_CRL_get_issuer(crl.get()), 0, XN_FLAG_RFC2253);
  list.issuer = bio_text(name.get());
  list.this_update = unix_time(X509_CRL_get0_lastUpdate(crl.get()));
  list.next_update = unix_time(X509_CRL_get0_nextUpdate(crl.get()));
  auto* number = static_cast<ASN1_INTEGER*>(
      X509_CRL_get_ext_d2i(crl.get(), NID_crl_number, nullptr, nullptr));
  if (number != nullptr) (void)ASN1_INTEGER_get_int64(&list.number, number);
  ASN1_INTEGER_free(number);
  STACK_OF(X509_REVOKED)* entries = X509_CRL_get_REVOKED(crl.get());
  for (int i = 0; i < sk_X509_REVOKED_num(entries); ++i) {
    const X509_REVOKED* entry = sk_X509_REVOKED_value(entries, i);
    BIGNUM* serial = ASN1_INTEGER_to_BN(X509_REVOKED_get0_serialNumber(entry), nullptr);
    char* text = serial != nullptr ? BN_bn2hex(serial) : nullptr;
    if (text != nullptr)
      list.revoked.push_back({text, unix_time(X509_REVOKED_get0_revocationDate(entry))});
    OPENSSL_free(text);
    BN_free(serial);
  }
  ERR_clear_error();
  return list;
}

}  // namespace phalanx::net
