#include "apps/certs_import.h"

#include <fmt/format.h>

#include <filesystem>
#include <optional>

#include "apps/certs_files.h"
#include "apps/certs_layout.h"
#include "phalanx/net/authority.h"
#include "phalanx/net/peer_verifier.h"

namespace phalanx::apps {
namespace {

// Of files to be imported, as the import tool of the guides insists.
constexpr mode_t kPublicMode = 0600;
constexpr mode_t kKeyMode = 0400;

const PlaneLayout& plane_of(const std::string& name) {
  for (const PlaneLayout& plane : kPlanes)
    if (plane.name == name) return plane;
  throw Error(Code::kInvalidArgument, "--plane: unknown plane " + name);
}

void advise(const net::CertificateInfo& info, const std::string& path, Problems& warnings) {
  if (info.signature.find("sha256") == std::string::npos &&
      info.signature.find("SHA256") == std::string::npos &&
      info.signature.find("sha512") == std::string::npos &&
      info.signature.find("SHA512") == std::string::npos &&
      !info.signature.starts_with("ED"))
    warnings.add({.what = "signature algorithm is not one of the recommended",
                  .where = path,
                  .found = info.signature,
                  .expected = "SHA-256 or SHA-512"});
}

void check_version(const net::CertificateInfo& info, const std::string& path, Problems& problems) {
  if (info.version != 3)
    problems.add({.what = "certificate is of an old version of X.509",
                  .where = path,
                  .found = std::to_string(info.version),
                  .expected = "3",
                  .fix = "have the authority issue version 3"});
}

template <typename Body>
void collect(Problems& problems, Body body) {
  try {
    body();
  } catch (const Error& error) {
    problems.add({.what = error.what()});
  }
}

}  // namespace

void import_files(const ImportOptions& options) {
  const PlaneLayout& plane = plane_of(options.plane);
  if (options.certificate.empty() != options.key.empty())
    throw Error(Code::kInvalidArgument,
                "--cert and --key belong together. Fix: name both, or neither");
  const auto at = [&](std::string_view path) { return fmt::format("{}/{}", options.home, path); };
  Problems problems;
  Problems warnings;
  std::vector<net::Certificate> authorities;
  std::string authority_text;
  for (const std::string& path : options.authorities)
    collect(problems, [&] {
      const net::Secret pem = read_or_throw(path, kPublicMode);
      for (const net::Certificate& one : net::Certificate::parse(pem.view(), path)) {
        check_version(one.info(), path, problems);
        advise(one.info(), path, warnings);
        if (auto found = net::plain_problem(one.info(), path)) problems.add(*found);
        if (!one.info().authority)
          warnings.add({.what = "usage 'Certificate Sign, CRL Sign' is recommended for an authority",
                        .where = path});
        authorities.push_back(one);
        authority_text += one.pem();
      }
    });
  if (options.authorities.empty() && std::filesystem::exists(at(plane.authority)))
    collect(problems, [&] {
      const net::Secret pem = read_or_throw(at(plane.authority));
      authorities = net::Certificate::parse(pem.view(), at(plane.authority));
    });

  std::string certificate_text;
  std::optional<net::Secret> key_text;
  net::Secret password;
  if (!options.certificate.empty())
    collect(problems, [&] {
      const net::Secret pem = read_or_throw(options.certificate, kPublicMode);
      const auto chain = net::Certificate::parse(pem.view(), options.certificate);
      check_version(chain[0].info(), options.certificate, problems);
      advise(chain[0].info(), options.certificate, warnings);
      certificate_text = pem.view();
      const net::PeerVerifier verifier({authorities, options.authorities, {}});
      auto found = authorities.empty()
                       ? net::plain_problem(chain[0].info(), options.certificate)
                       : verifier.problem(chain, net::Usage::kServer, options.certificate);
      // Between nodes each is the other's client too.
      if (!found && !authorities.empty() && plane.name == "inter-node")
        found = verifier.problem(chain, net::Usage::kClient, options.certificate);
      if (found) problems.add(*found);
      key_text = read_or_throw(options.key, kKeyMode);
      if (key_text->view().find("ENCRYPTED") != std::string_view::npos) {
        password = ask_password("Password for private key file: ", true);
        if (const std::string weak = net::password_weakness(password.view()); !weak.empty())
          problems.add({.what = "password of the private key is too weak: " + weak,
                        .where = options.key,
                        .fix = "encrypt the key with another password"});
      }
      const net::PrivateKey key =
          net::PrivateKey::parse(key_text->view(), password.view(), options.key);
      if (!net::matches(chain[0], key))
        problems.add({.what = "private key does not match the certificate",
                      .where = options.key,
                      .found = "a key other than that of " + options.certificate,
                      .fix = "name the key that the certificate was made for"});
    });

  std::string list_text;
  if (!options.revocations.empty())
    collect(problems, [&] {
      const net::Secret pem = read_or_throw(options.revocations, kPublicMode);
      list_text = pem.view();
      (void)net::read_revocation_list(pem.view(), options.revocations);
      if (!authorities.empty())
        net::PeerVerifier({authorities, options.authorities, {options.revocations}})
            .check_lists(problems);
    });
  for (const Problem& warning : warnings.list())
    fmt::print(stderr, "warning: {}\n", to_string(warning));
  problems.throw_if_any("nothing was imported");

  const auto put = [&](std::string_view path, std::string_view text) {
    write_security_file(at(path), text);
    fmt::print("{}\n", at(path));
  };
  if (!authority_text.empty()) put(plane.authority, authority_text);
  if (key_text) {
    if (!password.empty())
      put(plane.password,
          net::encrypt_password(password.view(), key_store_of(options.home).view(), "key store"));
    put(plane.key, key_text->view());
    put(plane.certificate, certificate_text);
  }
  if (!list_text.empty()) put(plane.revocations, list_text);
}

}  // namespace phalanx::apps
