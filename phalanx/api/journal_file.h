#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "phalanx/base/unique_fd.h"

namespace phalanx::api {

// What was accepted and is not finished, as an append-only file of lines: "+NUMBER TEXT" when an entry
// comes, "-NUMBER" when it goes. What an interrupted write left at the end is dropped; so are lines
// that are no such line, with a warning. Used from one thread.
class JournalFile {
 public:
  struct Entry {
    uint64_t number = 0;
    std::string text;  // one line
  };

  // Opens or makes the file (mode 0600), keeps others out of it, and reads it. Throws Error that names
  // the file: no such folder, a link, not this user's, open to others, larger than 8 GiB, or held by
  // another process.
  explicit JournalFile(const std::string& path);

  [[nodiscard]] const std::string& path() const { return path_; }
  // By number; those of an earlier process at first.
  [[nodiscard]] const std::map<uint64_t, std::string>& entries() const { return entries_; }
  // On the disk when it returns. Throws Error(kResourceExhausted), and keeps none of them, when the
  // disk takes no more.
  void add(std::span<const Entry> entries);
  // Those that are not there are passed over. Never throws: what cannot be written comes back after
  // a crash.
  void remove(std::span<const uint64_t> numbers) noexcept;

 private:
  void read();
  // A file of the present entries in place of this one. Throws Error.
  void rewrite();
  void append(const std::string& lines, bool durable);

  std::string path_;
  UniqueFd file_;
  int64_t size_ = 0;
  int64_t live_ = 0;  // bytes of it that are about present entries
  std::map<uint64_t, std::string> entries_;
};

}  // namespace phalanx::api
