#include "phalanx/base/guarded_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "phalanx/base/unique_fd.h"

namespace phalanx {
namespace {

bool checks_switched_off() {
  const char* value = std::getenv("MINDIE_CHECK_INPUTFILES_PERMISSION");
  return value != nullptr && std::string_view(value) == "0";
}

void check_owner_and_mode(const struct stat& st, const std::string& path, const FileRule& rule,
                          Problems& findings, Problems& warnings) {
  if (rule.root_exempt && ::getuid() == 0) return;
  if (rule.owner_must_match && st.st_uid != ::getuid()) {
    findings.add({.what = "file belongs to another user",
                  .where = path,
                  .found = fmt::format("owner uid {}", st.st_uid),
                  .expected = fmt::format("uid {}, which runs this process", ::getuid()),
                  .fix = fmt::format("chown {} '{}'", ::getuid(), path)});
  }
  const mode_t mode = st.st_mode & 0777;
  if ((mode & ~rule.max_mode) != 0) {
    const bool only_warns = rule.owner_x_warns && (mode & ~rule.max_mode) == S_IXUSR;
    (only_warns ? warnings : findings)
        .add({.what = "file permissions too wide",
                  .where = path,
                  .found = fmt::format("mode {:04o}", mode),
                  .expected = fmt::format("at most {:04o}", rule.max_mode),
                  .fix = fmt::format("chmod {:o} '{}'", mode & rule.max_mode, path)});
  }
}

// Open and admitted; what cannot be read at all is not valid.
struct Admitted {
  UniqueFd fd;
  int64_t size = 0;
};

Admitted admit(const std::string& path, const FileRule& rule, Problems& problems,
               Problems& warnings) {
  // O_NONBLOCK: opening a FIFO must not wait for its writer.
  const int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | (rule.symlink_allowed ? 0 : O_NOFOLLOW);
  UniqueFd fd(::open(path.c_str(), flags));
  if (!fd.valid()) {
    const int error = errno;
    struct stat link {};
    if (error == ELOOP && ::lstat(path.c_str(), &link) == 0 && S_ISLNK(link.st_mode)) {
      problems.add({.what = "file is a symbolic link",
                    .where = path,
                    .expected = "a regular file",
                    .fix = "name the file itself, or replace the link by a copy"});
    } else {
      problems.add({.what = fmt::format("file cannot be opened: {}", std::strerror(error)),
                    .where = path,
                    .expected = "an existing, readable regular file",
                    .fix = error == ENOENT ? "check the path" : "check owner and permissions"});
    }
    return {};
  }
  struct stat st {};
  if (::fstat(fd.get(), &st) != 0 || !S_ISREG(st.st_mode)) {
    problems.add({.what = "not a regular file", .where = path, .fix = "check the path"});
    return {};
  }
  if (rule.check_switch_applies && checks_switched_off()) {
    check_owner_and_mode(st, path, rule, warnings, warnings);
  } else {
    check_owner_and_mode(st, path, rule, problems, warnings);
  }
  if (st.st_size < rule.min_bytes) {
    problems.add({.what = st.st_size == 0 ? "file is empty" : "file is too short",
                  .where = path,
                  .found = fmt::format("{} bytes", st.st_size),
                  .expected = fmt::format("at least {}", rule.min_bytes)});
    return {};
  }
  if (st.st_size > rule.max_bytes) {
    problems.add({.what = "file is too large",
                  .where = path,
                  .found = fmt::format("{} bytes", st.st_size),
                  .expected = fmt::format("at most {}", rule.max_bytes)});
    return {};
  }
  return {std::move(fd), st.st_size};
}

}  // namespace

bool check_guarded_file(const std::string& path, const FileRule& rule, Problems& problems,
                        Problems& warnings) {
  return admit(path, rule, problems, warnings).fd.valid();
}

std::string read_guarded_file(const std::string& path, const FileRule& rule, Problems& problems,
                              Problems& warnings) {
  const Admitted file = admit(path, rule, problems, warnings);
  if (!file.fd.valid()) return {};
  std::string text(static_cast<size_t>(file.size), '\0');
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = ::read(file.fd.get(), text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      problems.add({.what = n < 0 ? fmt::format("file cannot be read: {}", std::strerror(errno))
                                  : "file became shorter while it was read",
                    .where = path});
      return {};
    }
    done += static_cast<size_t>(n);
  }
  return text;
}

}  // namespace phalanx
