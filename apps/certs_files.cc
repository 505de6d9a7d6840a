#include "apps/certs_files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "apps/certs_layout.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/net/security_file.h"

namespace phalanx::apps {
namespace {

[[noreturn]] void fail(const std::string& path, const char* what) {
  throw Error(Code::kPermissionDenied,
              fmt::format("{}: cannot {}: {}. Fix: check the folder's owner and permissions", path,
                          what, std::strerror(errno)));
}

void make_folders(const std::filesystem::path& folder) {
  if (folder.empty() || std::filesystem::exists(folder)) return;
  make_folders(folder.parent_path());
  if (::mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) fail(folder, "make the folder");
}

// One line of standard input, without echo on a terminal.
net::Secret read_line(const std::string& prompt) {
  const bool terminal = ::isatty(STDIN_FILENO) == 1;
  termios shown{};
  if (terminal) {
    fmt::print(stderr, "{}", prompt);
    std::fflush(stderr);
    ::tcgetattr(STDIN_FILENO, &shown);
    termios hidden = shown;
    hidden.c_lflag &= ~static_cast<tcflag_t>(ECHO);
    ::tcsetattr(STDIN_FILENO, TCSAFLUSH, &hidden);
  }
  std::string text;
  text.reserve(1024);  // no copies left behind by growth
  char c = 0;
  while (text.size() < 1024 && ::read(STDIN_FILENO, &c, 1) == 1 && c != '\n') text += c;
  if (terminal) {
    ::tcsetattr(STDIN_FILENO, TCSAFLUSH, &shown);
    fmt::print(stderr, "\n");
  }
  net::Secret line(text);
  net::wipe(text);
  return line;
}

}  // namespace

void write_security_file(const std::string& path, std::string_view text) {
  const std::filesystem::path target(path);
  make_folders(target.parent_path());
  const std::string fresh = path + ".new";
  ::unlink(fresh.c_str());
  const UniqueFd fd(::open(fresh.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0400));
  if (!fd.valid()) fail(fresh, "create it");
  for (size_t done = 0; done < text.size();) {
    const ssize_t count = ::write(fd.get(), text.data() + done, text.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail(fresh, "write it");
    done += static_cast<size_t>(count);
  }
  if (::fsync(fd.get()) != 0 || ::rename(fresh.c_str(), path.c_str()) != 0) fail(path, "write it");
}

net::Secret read_or_throw(const std::string& path, mode_t max_mode) {
  Problems problems;
  Problems warnings;
  std::string text = net::read_security_file(path, problems, warnings, max_mode);
  problems.throw_if_any("cannot use this file");
  net::Secret secret(text);
  net::wipe(text);
  return secret;
}

net::Secret ask_password(const std::string& prompt, bool twice) {
  net::Secret first = read_line(prompt);
  if (first.empty())
    throw Error(Code::kInvalidArgument,
                "no password was given. Fix: type it, or send it as one line to standard input");
  if (twice && ::isatty(STDIN_FILENO) == 1 && read_line("Again: ").view() != first.view())
    throw Error(Code::kInvalidArgument, "the two passwords differ. Fix: run the command again");
  return first;
}

net::Secret key_store_of(const std::string& home) {
  const std::string master = fmt::format("{}/{}", home, kKeyStore);
  const std::string copy = fmt::format("{}/{}", home, kKeyStoreCopy);
  if (std::filesystem::exists(master)) return read_or_throw(master);
  net::Secret store = net::make_key_store();
  write_security_file(master, store.view());
  write_security_file(copy, store.view());
  return store;
}

}  // namespace phalanx::apps
