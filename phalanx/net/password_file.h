#pragma once

// Passwords of private keys, encrypted at rest. One line of text each; docs/security.md has the
// formats.
//   password file  PHXPASS1:<first 8 hexadecimal digits of SHA-256 of the key>:<base64 of nonce (12
//                  bytes), ciphertext, tag (16 bytes)>   AES-256-GCM, associated data "PHXPASS1"
//   key store      PHXKEY1:<base64 of 32 random bytes>, mode 0400

#include <string>
#include <string_view>

#include "phalanx/base/error.h"
#include "phalanx/net/secret.h"

namespace phalanx::net {

// The file that opens password files, and its copy for the case that the first is damaged. Either
// path may be empty.
struct KeyStore {
  std::string master;
  std::string standby;
};

// A new key store as text.
[[nodiscard]] Secret make_key_store();

// The password file's line for `password`. Throws Error(kInvalidArgument) if `key_store` is none.
[[nodiscard]] std::string encrypt_password(std::string_view password, std::string_view key_store,
                                           const std::string& where);

// Reads both files under the rules for security files and decrypts. Empty with a problem added when
// that fails. A damaged master store with a good standby is a warning.
[[nodiscard]] Secret read_password(const std::string& password_file, const KeyStore& store,
                                   Problems& problems, Problems& warnings);

// Rules of the import tool: 8 characters at least, two of lower case, upper case, digit, special.
// Empty if fine, else what is wrong.
[[nodiscard]] std::string password_weakness(std::string_view password);

// 32 characters of letters and digits.
[[nodiscard]] Secret random_password();

}  // namespace phalanx::net
