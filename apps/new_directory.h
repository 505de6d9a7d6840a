#pragma once

#include <string>

namespace phalanx::apps {

// A directory that gets its final name only when everything in it is complete; removed otherwise.
class NewDirectory {
 public:
  // Throws kAlreadyExists where `path` exists and is not an empty directory.
  explicit NewDirectory(const std::string& path);
  ~NewDirectory();
  NewDirectory(const NewDirectory&) = delete;
  NewDirectory& operator=(const NewDirectory&) = delete;

  [[nodiscard]] const std::string& part() const { return part_; }  // where to write
  void finish();

 private:
  std::string path_;
  std::string part_;
};

}  // namespace phalanx::apps
