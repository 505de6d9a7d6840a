#include "apps/certs_config.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "phalanx/base/error.h"
#include "phalanx/base/guarded_file.h"
#include "phalanx/base/json.h"
#include "phalanx/base/unique_fd.h"

namespace phalanx::apps {
namespace {

constexpr int kDepth = 100;

[[noreturn]] void cannot_write(const std::string& path) {
  throw Error(
      Code::kPermissionDenied,
      fmt::format("{}: cannot be written: {}. Fix: check the folder's owner and permissions", path,
                  std::strerror(errno)));
}

}  // namespace

SecureConfig SecureConfig::read(const std::string& path) {
  Problems problems;
  Problems warnings;
  const std::string text = read_guarded_file(path, {}, problems, warnings);
  problems.throw_if_any("cannot switch TLS on");
  (void)parse_json(text, path, kDepth);  // bounded, and with line and column in its error
  auto json = nlohmann::ordered_json::parse(text);
  for (const auto& [section, key] : {std::pair{"ServerConfig", "httpsEnabled"},
                                     std::pair{"BackendConfig", "interNodeTLSEnabled"}}) {
    if (!json.is_object() || !json.contains(section) || !json[section].is_object())
      throw Error(
          Code::kInvalidArgument,
          fmt::format("{}: no object \"{}\", which a config.json has. Fix: phalanx config make "
                      "writes one",
                      path, section));
    json[section][key] = true;
  }
  SecureConfig config;
  config.path_ = path;
  config.text_ = json.dump(4) + "\n";
  struct stat st {};
  if (::stat(path.c_str(), &st) == 0) config.mode_ = st.st_mode & 0777;
  return config;
}

void SecureConfig::write() const {
  const std::string fresh = path_ + ".new";
  ::unlink(fresh.c_str());
  const UniqueFd fd(
      ::open(fresh.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!fd.valid()) cannot_write(fresh);
  for (size_t done = 0; done < text_.size();) {
    const ssize_t count = ::write(fd.get(), text_.data() + done, text_.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) cannot_write(fresh);
    done += static_cast<size_t>(count);
  }
  if (::fchmod(fd.get(), mode_) != 0 || ::fsync(fd.get()) != 0 ||
      ::rename(fresh.c_str(), path_.c_str()) != 0)
    cannot_write(path_);
}

}  // namespace phalanx::apps
