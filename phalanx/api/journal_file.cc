#include "phalanx/api/journal_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <optional>
#include <utility>

#include "phalanx/base/error.h"
#include "phalanx/base/log.h"

namespace phalanx::api {
namespace {

constexpr int64_t kMaxBytes = int64_t{8} << 30;
constexpr int64_t kSlack = 1 << 20;  // of lines about entries that are gone

[[noreturn]] void refuse(const std::string& path, const std::string& found, const std::string& fix) {
  throw Error(Code::kFailedPrecondition,
              fmt::format("request journal {} cannot be used: {}. Fix: {}", path, found, fix));
}

UniqueFd open_locked(const std::string& path, int flags) {
  UniqueFd file(::open(path.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC | flags, 0600));
  if (!file.valid())
    refuse(path, errno == ELOOP ? "it is a symbolic link" : std::strerror(errno),
           "name a file in a folder that this user may write");
  struct stat s {};
  if (::fstat(file.get(), &s) != 0 || !S_ISREG(s.st_mode))
    refuse(path, "it is no regular file", "name another file");
  if (s.st_uid != ::geteuid())
    refuse(path, fmt::format("it belongs to user {}", s.st_uid),
           "name a file of this user; it holds prompts");
  if ((s.st_mode & 077) != 0)
    refuse(path, fmt::format("its mode is {:04o}, expected 0600", s.st_mode & 07777),
           fmt::format("chmod 600 {}", path));
  if (s.st_size > kMaxBytes)
    refuse(path, fmt::format("it has {} bytes, at most {} are read", s.st_size, kMaxBytes),
           "move it away");
  if (::flock(file.get(), LOCK_EX | LOCK_NB) != 0)
    refuse(path, "another process holds it", "give each master a file of its own");
  return file;
}

void write_all(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) throw Error(Code::kResourceExhausted, n < 0 ? std::strerror(errno) : "nothing taken");
    bytes.remove_prefix(static_cast<size_t>(n));
  }
}

void sync(int fd) {
  if (::fdatasync(fd) != 0) throw Error(Code::kResourceExhausted, std::strerror(errno));
}

void sync_folder(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  const UniqueFd fd(::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd.valid()) (void)::fsync(fd.get());
}

std::string line_of(uint64_t number, const std::string& text) {
  return fmt::format("+{} {}\n", number, text);
}

std::optional<uint64_t> number_at(std::string_view line, size_t end) {
  uint64_t number = 0;
  const auto [at, error] = std::from_chars(line.data() + 1, line.data() + end, number);
  if (error != std::errc() || at != line.data() + end) return std::nullopt;
  return number;
}

}  // namespace

JournalFile::JournalFile(const std::string& path) : path_(path), file_(open_locked(path, 0)) {
  read();
  try {
    rewrite();  // without a torn end, to append to
  } catch (const Error& error) {
    refuse(path_, error.what(), "make room for it");
  }
}

void JournalFile::read() {
  std::string rest;
  std::string piece(1 << 20, '\0');
  int64_t damaged = 0;
  for (;;) {
    const ssize_t n = ::read(file_.get(), piece.data(), piece.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) refuse(path_, std::strerror(errno), "look at the disk");
    if (n == 0) break;
    rest.append(piece, 0, static_cast<size_t>(n));
    size_t begin = 0;
    for (size_t end; (end = rest.find('\n', begin)) != std::string::npos; begin = end + 1) {
      const std::string_view line(rest.data() + begin, end - begin);
      const size_t space = line.find(' ');
      const bool adds = line.starts_with('+') && space != std::string_view::npos;
      const auto number = adds                      ? number_at(line, space)
                          : line.starts_with('-') ? number_at(line, line.size())
                                                  : std::nullopt;
      if (!number)
        ++damaged;
      else if (adds)
        entries_[*number] = std::string(line.substr(space + 1));
      else
        entries_.erase(*number);
    }
    rest.erase(0, begin);
  }
  if (damaged > 0) log_warn("request journal {}: {} damaged lines were dropped", path_, damaged);
}

void JournalFile::rewrite() {
  const std::string next = path_ + ".new";
  (void)::unlink(next.c_str());  // of a process that ended here
  UniqueFd file = open_locked(next, O_EXCL | O_APPEND);
  int64_t size = 0;
  for (const auto& [number, text] : entries_) {
    const std::string line = line_of(number, text);
    write_all(file.get(), line);
    size += std::ssize(line);
  }
  sync(file.get());
  if (::rename(next.c_str(), path_.c_str()) != 0)
    throw Error(Code::kResourceExhausted, std::strerror(errno));
  sync_folder(path_);
  file_ = std::move(file);
  size_ = live_ = size;
}

void JournalFile::append(const std::string& lines, bool durable) {
  try {
    write_all(file_.get(), lines);
    if (durable) sync(file_.get());
  } catch (const Error&) {
    (void)!::ftruncate(file_.get(), size_);
    throw;
  }
  size_ += std::ssize(lines);
}

void JournalFile::add(std::span<const Entry> entries) {
  if (entries.empty()) return;
  std::string lines;
  for (const Entry& entry : entries) lines += line_of(entry.number, entry.text);
  append(lines, true);
  live_ += std::ssize(lines);
  for (const Entry& entry : entries) entries_[entry.number] = entry.text;
}

void JournalFile::remove(std::span<const uint64_t> numbers) noexcept {
  try {
    std::string lines;
    for (const uint64_t number : numbers) {
      const auto it = entries_.find(number);
      if (it == entries_.end()) continue;
      live_ -= std::ssize(line_of(number, it->second));
      lines += fmt::format("-{}\n", number);
      entries_.erase(it);
    }
    if (lines.empty()) return;
    if (size_ + std::ssize(lines) > 2 * live_ + kSlack)
      rewrite();
    else
      append(lines, false);
  } catch (const std::exception& error) {
    log_warn("request journal {}: {}", path_, error.what());
  }
}

}  // namespace phalanx::api
