#include "apps/check_installation.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "phalanx/base/unique_fd.h"

namespace phalanx::apps {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMostEntries = 10000;
constexpr int kDeepest = 16;

// `path` under the descriptor's directory, judged by what is open: nothing can be swapped in between.
struct Entry {
  std::string path;
  struct stat st {};
  UniqueFd fd;  // directories only
};

class Walk {
 public:
  Walk(Problems& problems, Problems& warnings) : problems_(problems), warnings_(warnings) {}

  enum class Strictness { kProblem, kWarning, kSecurity };

  // One entry: modes wider than `wanted` are a finding.
  void judge(const Entry& entry, mode_t wanted, Strictness strictness) {
    Problems& findings = strictness == Strictness::kWarning ? warnings_ : problems_;
    if (S_ISLNK(entry.st.st_mode)) {
      findings.add({.what = "symbolic link in the installation",
                    .where = entry.path,
                    .expected = "the file itself",
                    .fix = fmt::format("cp --remove-destination \"$(readlink -f '{0}')\" '{0}'",
                                       entry.path)});
      return;
    }
    const mode_t mode = entry.st.st_mode & 0777;
    const mode_t wider = mode & ~wanted;
    if (wider != 0) {
      // chmod -R 700 of the guide leaves an x bit on files.
      const bool own_x_only =
          strictness == Strictness::kSecurity && S_ISREG(entry.st.st_mode) && wider == S_IXUSR;
      (own_x_only ? warnings_ : findings)
          .add({.what = S_ISDIR(entry.st.st_mode) ? "directory permissions too wide"
                                                  : "file permissions too wide",
                .where = entry.path,
                .found = fmt::format("mode {:04o}", mode),
                .expected = fmt::format("at most {:04o}", wanted),
                .fix = fmt::format("chmod {:o} '{}'", mode & wanted, entry.path)});
    }
    if (entry.st.st_uid != ::getuid() && entry.st.st_uid != 0)
      findings.add({.what = "belongs to another user, who could replace it",
                    .where = entry.path,
                    .found = fmt::format("owner uid {}", entry.st.st_uid),
                    .expected = fmt::format("uid {}", ::getuid()),
                    .fix = fmt::format("chown {} '{}'", ::getuid(), entry.path)});
  }

  static bool open(int folder, const std::string& name, std::string path, Entry* entry) {
    entry->path = std::move(path);
    if (::fstatat(folder, name.c_str(), &entry->st, AT_SYMLINK_NOFOLLOW) != 0) return false;
    if (!S_ISDIR(entry->st.st_mode)) return true;
    entry->fd.reset(::openat(folder, name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    return entry->fd.valid() && ::fstat(entry->fd.get(), &entry->st) == 0;
  }

  // Everything below `folder`; files at most `file_mode`, directories `directory_mode`.
  void below(const Entry& folder, mode_t directory_mode, mode_t file_mode, Strictness strictness,
             int depth = 0) {
    if (depth > kDeepest) return;
    std::error_code error;
    for (const auto& item : fs::directory_iterator(
             fmt::format("/proc/self/fd/{}", folder.fd.get()), error)) {
      if (++seen_ > kMostEntries) return;
      const std::string name = item.path().filename();
      Entry entry;
      if (!open(folder.fd.get(), name, folder.path + "/" + name, &entry)) continue;
      const bool directory = S_ISDIR(entry.st.st_mode);
      judge(entry, directory ? directory_mode : file_mode, strictness);
      if (directory) below(entry, directory_mode, file_mode, strictness, depth + 1);
    }
  }

 private:
  Problems& problems_;
  Problems& warnings_;
  size_t seen_ = 0;
};

}  // namespace

void check_installation(const std::string& home, Problems& problems, Problems& warnings) {
  using Strictness = Walk::Strictness;
  Walk walk(problems, warnings);
  Entry root;
  if (home.empty() || !Walk::open(AT_FDCWD, home, home, &root) || !root.fd.valid()) return;
  struct Rule {
    const char* name;
    mode_t mode;
    mode_t inner_directories;
    mode_t inner_files;  // 0: not looked into
    Strictness strictness;
  };
  constexpr Rule kRules[] = {
      {"bin", 0550, 0550, 0550, Strictness::kWarning},
      {"lib", 0550, 0550, 0440, Strictness::kWarning},
      {"include", 0550, 0550, 0550, Strictness::kWarning},
      {"scripts", 0550, 0550, 0550, Strictness::kWarning},
      {"logs", 0750, 0, 0, Strictness::kWarning},
      {"conf", 0750, 0, 0, Strictness::kProblem},
      {"security", 0700, 0700, 0600, Strictness::kSecurity},
  };
  // An ordinary build folder is no installation.
  struct stat st {};
  if (::fstatat(root.fd.get(), "conf", &st, 0) != 0 &&
      ::fstatat(root.fd.get(), "security", &st, 0) != 0)
    return;
  walk.judge(root, 0750, Strictness::kWarning);
  for (const Rule& rule : kRules) {
    Entry entry;
    if (!Walk::open(root.fd.get(), rule.name, home + "/" + rule.name, &entry)) continue;
    walk.judge(entry, rule.mode, rule.strictness);
    if (rule.inner_files != 0 && entry.fd.valid())
      walk.below(entry, rule.inner_directories, rule.inner_files, rule.strictness);
  }
}

}  // namespace phalanx::apps
