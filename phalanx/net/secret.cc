#include "phalanx/net/secret.h"

#include <fcntl.h>
#include <openssl/crypto.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "phalanx/base/unique_fd.h"

namespace phalanx::net {

Secret::Secret(size_t size) : data_(new char[size]()), size_(size) {}

Secret::Secret(std::string_view bytes) : Secret(bytes.size()) {
  std::memcpy(data_, bytes.data(), bytes.size());
}

Secret::~Secret() {
  if (data_ != nullptr) ::OPENSSL_cleanse(data_, size_);
  delete[] data_;
}

void wipe(std::string& text) {
  ::OPENSSL_cleanse(text.data(), text.size());
  text.clear();
}

void protect_keys() {
  (void)::CRYPTO_secure_malloc_init(size_t{64} << 10, 32);
  // Which memory a core dump holds (core(5)): none. The dump itself, with registers, is still made.
  const UniqueFd fd(::open("/proc/self/coredump_filter", O_WRONLY | O_CLOEXEC));
  if (fd.valid()) (void)!::write(fd.get(), "0\n", 2);
}

}  // namespace phalanx::net
