#pragma once

#include <sys/types.h>

#include <string>
#include <string_view>

#include "phalanx/base/error.h"
#include "phalanx/net/secret.h"
#include "phalanx/net/tls_material.h"

namespace phalanx::apps {

// Writes a file of mode 0400 in one step (a new file takes the old one's name), its folders with
// 0700. Throws Error naming path and cause.
void write_security_file(const std::string& path, std::string_view text);

// The text of a security file, admitted by its rules and at most that mode. Throws Error with the
// problem.
[[nodiscard]] net::Secret read_or_throw(const std::string& path, mode_t max_mode = 0640);

// Asks for a password, twice if `twice`, on the terminal without echo, or reads one line of standard
// input where that is no terminal. Throws Error(kInvalidArgument) if the two differ or none comes.
[[nodiscard]] net::Secret ask_password(const std::string& prompt, bool twice);

// The key store below `home`, made with its copy if it is not there yet.
[[nodiscard]] net::Secret key_store_of(const std::string& home);

}  // namespace phalanx::apps
