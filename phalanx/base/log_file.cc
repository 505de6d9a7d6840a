#include "phalanx/base/log_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "phalanx/base/error.h"

namespace phalanx {

LogFile::LogFile(std::string path, int64_t max_bytes, int kept)
    : path_(std::move(path)), max_bytes_(max_bytes), kept_(kept) {
  open();
  if (!fd_.valid())
    throw Error(Code::kUnavailable,
                fmt::format("cannot open the log file {}: {}. Fix: name another directory with "
                            "MINDIE_LOG_PATH",
                            path_, std::strerror(errno)));
}

void LogFile::open() {
  fd_.reset(::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0640));
  struct stat st {};
  size_ = fd_.valid() && ::fstat(fd_.get(), &st) == 0 ? st.st_size : 0;
}

std::string LogFile::rotated(int number) const {
  const size_t dot = path_.rfind('.');
  const size_t slash = path_.rfind('/');
  const bool has_dot = dot != std::string::npos && (slash == std::string::npos || dot > slash);
  const std::string stem = has_dot ? path_.substr(0, dot) : path_;
  return fmt::format("{}.{:02}{}", stem, number, has_dot ? path_.substr(dot) : "");
}

void LogFile::rotate() {
  ::unlink(rotated(kept_).c_str());
  for (int i = kept_ - 1; i >= 1; --i) std::rename(rotated(i).c_str(), rotated(i + 1).c_str());
  std::rename(path_.c_str(), rotated(1).c_str());
  open();
}

void LogFile::write(std::string_view line) {
  if (size_ > 0 && size_ + static_cast<int64_t>(line.size()) > max_bytes_) rotate();
  if (!fd_.valid()) open();
  while (!line.empty()) {
    const ssize_t n = ::write(fd_.get(), line.data(), line.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      ++lost_;
      return;
    }
    size_ += n;
    line.remove_prefix(static_cast<size_t>(n));
  }
}

}  // namespace phalanx
