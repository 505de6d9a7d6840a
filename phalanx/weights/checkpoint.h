#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/weights/safetensors.h"

namespace phalanx::weights {

// The tensors of a checkpoint directory: model.safetensors, or model.safetensors.index.json and the
// files it names, or the same as quant_model_weight*.safetensors. Headers are verified, no weight is read. Immutable but for replace: any thread.
class Checkpoint {
 public:
  // Adds everything that is wrong to `problems`, and is of use only if nothing was.
  Checkpoint(const std::string& directory, Problems& problems);
  // Throws Error(kInvalidArgument) with all problems.
  explicit Checkpoint(const std::string& directory);

  [[nodiscard]] const TensorEntry* find(std::string_view name) const;  // nullptr: not there
  [[nodiscard]] const std::map<std::string, TensorEntry, std::less<>>& tensors() const {
    return tensors_;
  }
  // Puts views of a tensor (parts of its bytes, under other names) in its place, before the
  // checkpoint is shared. Adds a problem where a name is taken.
  void replace(const std::string& name, std::vector<TensorEntry> views, Problems& problems);

  [[nodiscard]] const std::string& path_of(const TensorEntry& entry) const {
    return files_[static_cast<size_t>(entry.file)].path;
  }
  [[nodiscard]] int fd_of(const TensorEntry& entry) const {
    return files_[static_cast<size_t>(entry.file)].fd.get();
  }
  [[nodiscard]] const std::string& directory() const { return directory_; }

 private:
  struct File {
    std::string path;
    UniqueFd fd;
  };
  void open(Problems& problems);
  void add_file(const std::string& path, Problems& problems);
  void add_indexed(const std::string& index_path, Problems& problems);

  std::string directory_;
  std::vector<File> files_;
  std::map<std::string, TensorEntry, std::less<>> tensors_;
};

}  // namespace phalanx::weights
