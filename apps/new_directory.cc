#include "apps/new_directory.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "phalanx/base/error.h"

namespace phalanx::apps {

namespace fs = std::filesystem;

NewDirectory::NewDirectory(const std::string& path)
    : path_(fs::path(path).lexically_normal().string()) {
  while (path_.size() > 1 && path_.back() == '/') path_.pop_back();
  std::error_code ignored;
  if (fs::exists(path_, ignored) &&
      !(fs::is_directory(path_, ignored) && fs::is_empty(path_, ignored)))
    throw Error(
        Code::kAlreadyExists,
        fmt::format("{}: exists and is not an empty directory. Fix: remove it, or name another",
                    path_));
  part_ = fmt::format("{}.part.{}", path_, ::getpid());
  if (::mkdir(part_.c_str(), 0750) != 0)
    throw Error(Code::kUnavailable,
                fmt::format("cannot create the directory {}: {}", part_, std::strerror(errno)));
  ::chmod(part_.c_str(), 0750);
}

NewDirectory::~NewDirectory() {
  std::error_code ignored;
  if (!part_.empty()) fs::remove_all(part_, ignored);
}

void NewDirectory::finish() {
  if (std::rename(part_.c_str(), path_.c_str()) != 0)
    throw Error(Code::kUnavailable,
                fmt::format("cannot rename {} to {}: {}", part_, path_, std::strerror(errno)));
  part_.clear();
}

}  // namespace phalanx::apps
