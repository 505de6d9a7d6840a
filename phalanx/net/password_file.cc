#include "phalanx/net/password_file.h"

#include <fmt/format.h>
#include <openssl/rand.h>

#include <optional>

#include "phalanx/base/check.h"
#include "phalanx/net/digest.h"
#include "phalanx/net/openssl_handles.h"
#include "phalanx/net/security_file.h"

namespace phalanx::net {
namespace {

constexpr std::string_view kPasswordMark = "PHXPASS1";
constexpr std::string_view kStoreMark = "PHXKEY1";
constexpr size_t kKeyBytes = 32, kNonceBytes = 12, kTagBytes = 16, kMaxPassword = 1024;

std::string to_base64(std::string_view bytes) {
  std::string text(4 * ((bytes.size() + 2) / 3) + 1, '\0');
  const int size = EVP_EncodeBlock(reinterpret_cast<unsigned char*>(text.data()),
                                   reinterpret_cast<const unsigned char*>(bytes.data()),
                                   static_cast<int>(bytes.size()));
  text.resize(static_cast<size_t>(size));
  return text;
}

// Nothing for what is not base64.
std::optional<Secret> from_base64(std::string_view text) {
  if (text.empty() || text.size() % 4 != 0 || text.size() > 4 * kMaxPassword) return std::nullopt;
  Secret padded(text.size() / 4 * 3);
  const int size = EVP_DecodeBlock(reinterpret_cast<unsigned char*>(padded.data()),
                                   reinterpret_cast<const unsigned char*>(text.data()),
                                   static_cast<int>(text.size()));
  ERR_clear_error();
  if (size < 0) return std::nullopt;
  const size_t padding = text.ends_with("==") ? 2 : text.ends_with("=") ? 1 : 0;
  return Secret(padded.view().substr(0, padded.size() - padding));
}

std::string_view first_line(std::string_view text) {
  const size_t end = text.find_last_not_of(" \r\n\t");
  return end == std::string_view::npos ? std::string_view() : text.substr(0, end + 1);
}

std::optional<Secret> key_of_store(std::string_view text) {
  text = first_line(text);
  if (!text.starts_with(kStoreMark) || text.size() <= kStoreMark.size()) return std::nullopt;
  auto key = from_base64(text.substr(kStoreMark.size() + 1));
  if (!key || key->size() != kKeyBytes) return std::nullopt;
  return key;
}

std::string key_id(const Secret& key) { return sha256_hex(key.view()).substr(0, 8); }

const unsigned char* bytes_of(std::string_view text) {
  return reinterpret_cast<const unsigned char*>(text.data());
}

// Nothing if the tag does not fit.
std::optional<Secret> decrypt(std::string_view sealed, const Secret& key) {
  if (sealed.size() < kNonceBytes + kTagBytes) return std::nullopt;
  const std::string_view nonce = sealed.substr(0, kNonceBytes);
  std::string tag(sealed.substr(sealed.size() - kTagBytes));
  const std::string_view text = sealed.substr(kNonceBytes, sealed.size() - kNonceBytes - kTagBytes);
  const CipherContextPtr context(EVP_CIPHER_CTX_new());
  Secret plain(text.size());
  auto* out = reinterpret_cast<unsigned char*>(plain.data());
  int size = 0;
  const bool good =
      EVP_DecryptInit_ex(context.get(), EVP_aes_256_gcm(), nullptr, bytes_of(key.view()),
                         bytes_of(nonce)) == 1 &&
      EVP_DecryptUpdate(context.get(), nullptr, &size, bytes_of(kPasswordMark),
                        static_cast<int>(kPasswordMark.size())) == 1 &&
      EVP_DecryptUpdate(context.get(), out, &size, bytes_of(text), static_cast<int>(text.size())) ==
          1 &&
      EVP_CIPHER_CTX_ctrl(context.get(), EVP_CTRL_GCM_SET_TAG, kTagBytes, tag.data()) == 1 &&
      EVP_DecryptFinal_ex(context.get(), out + text.size(), &size) == 1;
  ERR_clear_error();
  if (!good) return std::nullopt;
  return plain;
}

// The key of the first usable store.
std::optional<Secret> open_store(const KeyStore& store, Problems& problems, Problems& warnings) {
  Problems found;
  for (const std::string& path : {store.master, store.standby}) {
    if (path.empty()) continue;
    std::string text = read_security_file(path, found, warnings);
    auto key = key_of_store(text);
    if (!key && !text.empty())
      found.add({.what = "key store of the passwords is not one of Phalanx's",
                 .where = path,
                 .found = fmt::format("{} bytes", text.size()),
                 .expected = fmt::format("one line that begins with {}:", kStoreMark),
                 .fix = "put the file back, or encrypt the password again with 'phalanx certs "
                        "encrypt' (key stores of KMC cannot be read)"});
    wipe(text);
    if (!key) continue;
    warnings.add_all(found);
    return key;
  }
  if (store.master.empty() && store.standby.empty())
    found.add({.what = "a password file needs a key store, and none is named",
               .where = "kmcKsfMaster",
               .fix = "name the file that 'phalanx certs encrypt' wrote"});
  problems.add_all(found);
  return std::nullopt;
}

}  // namespace

Secret make_key_store() {
  unsigned char key[kKeyBytes];
  PHALANX_CHECK(RAND_priv_bytes(key, sizeof key) == 1);
  std::string text = to_base64({reinterpret_cast<const char*>(key), sizeof key});
  std::string line = fmt::format("{}:{}\n", kStoreMark, text);
  Secret store(line);
  wipe(text);
  wipe(line);
  ::OPENSSL_cleanse(key, sizeof key);
  return store;
}

std::string encrypt_password(std::string_view password, std::string_view key_store,
                             const std::string& where) {
  const auto key = key_of_store(key_store);
  if (!key)
    throw Error(Code::kInvalidArgument,
                fmt::format("{}: not a key store of Phalanx, expected one line that begins with "
                            "{}:. Fix: name another file, it will be created",
                            where, kStoreMark));
  if (password.empty() || password.size() > kMaxPassword)
    throw Error(Code::kInvalidArgument,
                fmt::format("password: found {} characters, expected 1 to {}", password.size(),
                            kMaxPassword));
  std::string sealed(kNonceBytes + password.size() + kTagBytes, '\0');
  auto* out = reinterpret_cast<unsigned char*>(sealed.data());
  PHALANX_CHECK(RAND_bytes(out, kNonceBytes) == 1);
  const CipherContextPtr context(EVP_CIPHER_CTX_new());
  int size = 0;
  PHALANX_CHECK(
      EVP_EncryptInit_ex(context.get(), EVP_aes_256_gcm(), nullptr, bytes_of(key->view()), out) ==
          1 &&
      EVP_EncryptUpdate(context.get(), nullptr, &size, bytes_of(kPasswordMark),
                        static_cast<int>(kPasswordMark.size())) == 1 &&
      EVP_EncryptUpdate(context.get(), out + kNonceBytes, &size, bytes_of(password),
                        static_cast<int>(password.size())) == 1 &&
      EVP_EncryptFinal_ex(context.get(), out + kNonceBytes + password.size(), &size) == 1 &&
      EVP_CIPHER_CTX_ctrl(context.get(), EVP_CTRL_GCM_GET_TAG, kTagBytes,
                          out + kNonceBytes + password.size()) == 1);
  return fmt::format("{}:{}:{}\n", kPasswordMark, key_id(*key), to_base64(sealed));
}

Secret read_password(const std::string& password_file, const KeyStore& store, Problems& problems,
                     Problems& warnings) {
  const std::string text = read_security_file(password_file, problems, warnings);
  if (text.empty()) return {};
  std::string_view line = first_line(text);
  constexpr size_t kPrefix = kPasswordMark.size() + 1 + 8 + 1;
  std::optional<Secret> sealed;
  if (line.starts_with(kPasswordMark) && line.size() > kPrefix && line[kPrefix - 1] == ':')
    sealed = from_base64(line.substr(kPrefix));
  if (!sealed) {
    problems.add({.what = "password file is not in the format of Phalanx",
                  .where = password_file,
                  .found = fmt::format("{} bytes", text.size()),
                  .expected = fmt::format("one line that begins with {}:", kPasswordMark),
                  .fix = fmt::format("phalanx certs encrypt --out '{}' (files that KMC encrypted "
                                     "cannot be read, and a password in clear is not accepted)",
                                     password_file)});
    return {};
  }
  const auto key = open_store(store, problems, warnings);
  if (!key) return {};
  auto plain = decrypt(sealed->view(), *key);
  if (!plain) {
    const std::string_view wanted = line.substr(kPasswordMark.size() + 1, 8);
    const std::string id = key_id(*key);
    problems.add({.what = wanted == id ? "password file is damaged"
                                       : "password file was encrypted with another key store",
                  .where = password_file,
                  .found = fmt::format("key {}", wanted),
                  .expected = fmt::format("key {} of {}", id, store.master),
                  .fix = fmt::format("phalanx certs encrypt --out '{}'", password_file)});
    return {};
  }
  return std::move(*plain);
}

std::string password_weakness(std::string_view password) {
  if (password.size() < 8)
    return fmt::format("found {} characters, expected 8 at least", password.size());
  bool lower = false, upper = false, digit = false, special = false;
  for (const char c : password) {
    if (c >= 'a' && c <= 'z') lower = true;
    else if (c >= 'A' && c <= 'Z') upper = true;
    else if (c >= '0' && c <= '9') digit = true;
    else special = true;
  }
  if (lower + upper + digit + special < 2)
    return "expected at least two of lower case, upper case, digits, special characters";
  return {};
}

Secret random_password() {
  constexpr std::string_view kLetters =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";  // 64: no bias
  Secret password(size_t{32});
  PHALANX_CHECK(RAND_priv_bytes(reinterpret_cast<unsigned char*>(password.data()),
                                static_cast<int>(password.size())) == 1);
  for (size_t i = 0; i < password.size(); ++i)
    password.data()[i] = kLetters[static_cast<unsigned char>(password.data()[i]) % 64];
  return password;
}

}  // namespace phalanx::net
