#include "phalanx/net/tls_material.h"

#include <fmt/format.h>
#include <openssl/pem.h>

#include <cstring>

#include "phalanx/base/check.h"
#include "phalanx/net/openssl_handles.h"
#include "phalanx/net/security_file.h"

namespace phalanx::net {
namespace {

struct Passphrase {
  std::string_view text;
  bool asked = false;
};

int give_passphrase(char* buffer, int size, int, void* user) {
  auto* passphrase = static_cast<Passphrase*>(user);
  passphrase->asked = true;
  if (passphrase->text.size() > static_cast<size_t>(size)) return -1;
  std::memcpy(buffer, passphrase->text.data(), passphrase->text.size());
  return static_cast<int>(passphrase->text.size());
}

std::vector<Certificate> parse_certificates(const std::string& pem, const std::string& path,
                                            Problems& problems) {
  if (pem.empty()) return {};
  try {
    return Certificate::parse(pem, path);
  } catch (const Error& error) {
    const std::string text = std::string(error.what()).substr(path.size() + 2);
    problems.add({.what = "certificate cannot be read",
                  .where = path,
                  .found = text.substr(0, text.find(", expected")),
                  .expected = "a PEM file with BEGIN CERTIFICATE",
                  .fix = "export the certificate again as PEM"});
    return {};
  }
}

KeyPtr load_key(const TlsFiles& files, Problems& problems, Problems& warnings) {
  std::string pem = read_security_file(files.key, problems, warnings);
  if (pem.empty()) return nullptr;
  Secret text(pem);
  wipe(pem);
  const bool encrypted = text.view().find("ENCRYPTED") != std::string_view::npos;
  Secret password;
  if (encrypted) {
    if (files.key_password.empty()) {
      problems.add({.what = "private key is encrypted, and no password file is named",
                    .where = files.key,
                    .fix = "phalanx certs encrypt --out FILE, and name it in the configuration"});
      return nullptr;
    }
    const size_t before = problems.list().size();
    password = read_password(files.key_password, files.key_store, problems, warnings);
    if (problems.list().size() != before) return nullptr;
  }
  Passphrase passphrase{password.view()};
  const BioPtr bio = memory_bio(text.view());
  ERR_clear_error();
  KeyPtr key(PEM_read_bio_PrivateKey(bio.get(), nullptr, give_passphrase, &passphrase));
  const std::string reason = take_openssl_error();
  if (key) return key;
  if (encrypted && passphrase.asked) {
    problems.add({.what = "password of the private key is wrong",
                  .where = files.key,
                  .found = "the password in " + files.key_password + " does not open it",
                  .fix = fmt::format("phalanx certs encrypt --out '{}'", files.key_password)});
  } else {
    problems.add({.what = "private key is broken",
                  .where = files.key,
                  .found = reason,
                  .expected = "a PEM file with BEGIN PRIVATE KEY or BEGIN ENCRYPTED PRIVATE KEY",
                  .fix = "export the key again as PEM"});
  }
  return nullptr;
}

}  // namespace

std::optional<Problem> identity_problem(const CertificateInfo& info,
                                        const std::vector<std::string>& addresses,
                                        const std::string& role, const std::string& where) {
  std::vector<std::string> names = info.addresses;
  names.insert(names.end(), info.host_names.begin(), info.host_names.end());
  const std::string named = names.empty() ? "no address" : fmt::format("{}", fmt::join(names, ", "));
  for (const std::string& address : addresses) {
    if (info.names(address)) continue;
    return Problem{.what = "certificate is of another node",
                   .where = fmt::format("{}, {}", where, who(info)),
                   .found = "subject alternative names " + named,
                   .expected = address};
  }
  if (!role.empty() && !info.role().empty() && info.role() != role)
    return Problem{.what = "certificate is of another role",
                   .where = fmt::format("{}, {}", where, who(info)),
                   .found = info.role(),
                   .expected = role};
  return std::nullopt;
}

std::shared_ptr<const TlsMaterial> TlsMaterial::load(const TlsFiles& files, const TlsNeeds& needs,
                                                     Problems& problems, Problems& warnings) {
  const size_t before = problems.list().size();
  auto material = std::shared_ptr<TlsMaterial>(new TlsMaterial);
  material->files_ = files;
  material->chain_ = parse_certificates(read_security_file(files.certificate, problems, warnings),
                                        files.certificate, problems);
  if (KeyPtr key = load_key(files, problems, warnings))
    material->key_.reset(key.release(), EVP_PKEY_free);

  PeerVerifier::Options options{.authority_files = files.authorities, .crl_files = files.crls};
  for (const std::string& path : files.authorities) {
    for (Certificate& authority :
         parse_certificates(read_security_file(path, problems, warnings), path, problems)) {
      if (authority.info().authority) {
        options.authorities.push_back(std::move(authority));
        continue;
      }
      problems.add({.what = "certificate in the list of authorities is not one of an authority",
                    .where = fmt::format("{}, {}", path, who(authority.info())),
                    .found = "no usage 'Certificate Sign'",
                    .fix = "name the certificate of the authority"});
    }
  }
  material->verifier_ = std::make_unique<PeerVerifier>(std::move(options));

  if (!material->chain_.empty()) {
    X509* const own = material->chain_[0].native();
    if (material->key_ && X509_check_private_key(own, material->key_.get()) != 1) {
      ERR_clear_error();
      problems.add({.what = "private key does not match the certificate",
                    .where = files.key,
                    .found = "a key other than that of " + files.certificate,
                    .expected = material->own().key_type + " key of " + who(material->own()),
                    .fix = "name the key that the certificate was made for"});
    }
    if (auto wrong =
            identity_problem(material->own(), needs.addresses, needs.role, files.certificate)) {
      wrong->fix = needs.fix;
      problems.add(*wrong);
    }
  }
  // Without authorities nobody judges our certificate but its users: dates and strength remain.
  if (files.authorities.empty() && !material->chain_.empty())
    if (auto found = plain_problem(material->own(), files.certificate)) problems.add(*found);
  // Judged only with every file at hand: else a missing authority would show as a wrong one.
  if (problems.list().size() == before && !files.authorities.empty()) {
    material->verifier().check_lists(problems);
    for (const Usage usage : {Usage::kServer, Usage::kClient}) {
      if (problems.list().size() != before || !(usage == Usage::kServer ? needs.server : needs.client))
        continue;
      if (auto found = material->verifier().problem(material->chain_, usage, files.certificate))
        problems.add(*found);
    }
  }
  return problems.list().size() == before ? material : nullptr;
}

std::shared_ptr<const TlsMaterial> TlsMaterial::of(const Certificate& certificate,
                                                   const PrivateKey& key,
                                                   std::vector<Certificate> authorities) {
  auto material = std::shared_ptr<TlsMaterial>(new TlsMaterial);
  material->chain_ = {certificate};
  EVP_PKEY_up_ref(key.native());
  material->key_.reset(key.native(), EVP_PKEY_free);
  material->verifier_ =
      std::make_unique<PeerVerifier>(PeerVerifier::Options{.authorities = std::move(authorities)});
  return material;
}

std::string TlsMaterial::chain_pem() const {
  std::string text;
  for (const Certificate& certificate : chain_) text += certificate.pem();
  return text;
}

std::string TlsMaterial::authorities_pem() const {
  std::string text;
  for (const Certificate& authority : verifier_->options().authorities) text += authority.pem();
  return text;
}

Secret TlsMaterial::key_pem() const {
  const BioPtr bio(BIO_new(BIO_s_secmem()));
  PHALANX_CHECK(PEM_write_bio_PKCS8PrivateKey(bio.get(), key_.get(), nullptr, nullptr, 0, nullptr,
                                              nullptr) == 1);
  char* data = nullptr;
  const long size = BIO_get_mem_data(bio.get(), &data);
  return Secret(std::string_view(data, static_cast<size_t>(size)));
}

}  // namespace phalanx::net
