#include "phalanx/weights/checkpoint.h"

#include "phalanx/base/check.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "phalanx/base/json.h"

namespace phalanx::weights {
namespace {

constexpr int64_t kMaxIndexBytes = 64 << 20;

bool exists(const std::string& path) {
  struct stat st {};
  return ::stat(path.c_str(), &st) == 0;
}

bool is_plain_file_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos &&
         name.find('\0') == std::string::npos;
}

// msModelSlim's quant_model_weight_<type>.safetensors, or the index of several; empty: none.
std::string quantised_weights(const std::string& directory) {
  std::string file;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(directory, ignored)) {
    const std::string name = entry.path().filename();
    if (!name.starts_with("quant_model_weight")) continue;
    if (name.ends_with(".safetensors.index.json")) return directory + "/" + name;
    // A part of several carries a number.
    if (name.ends_with(".safetensors") && name.find("-of-") == std::string::npos &&
        (file.empty() || name < file))
      file = name;
  }
  return file.empty() ? "" : directory + "/" + file;
}

}  // namespace

Checkpoint::Checkpoint(const std::string& directory, Problems& problems) : directory_(directory) {
  open(problems);
}

Checkpoint::Checkpoint(const std::string& directory) : directory_(directory) {
  Problems problems;
  open(problems);
  problems.throw_if_any(fmt::format("checkpoint {} cannot be used", directory));
}

void Checkpoint::open(Problems& problems) {
  const std::string single = directory_ + "/model.safetensors";
  const std::string index = directory_ + "/model.safetensors.index.json";
  if (exists(single)) {
    add_file(single, problems);
  } else if (exists(index)) {
    add_indexed(index, problems);
  } else if (const std::string quantised = quantised_weights(directory_); !quantised.empty()) {
    if (quantised.ends_with(".json"))
      add_indexed(quantised, problems);
    else
      add_file(quantised, problems);
  } else {
    problems.add({.what = "no weights found", .where = directory_,
                  .found = "neither model.safetensors nor model.safetensors.index.json",
                  .expected = "one of them",
                  .fix = "give the directory of a safetensors checkpoint; convert other formats first"});
  }
}

void Checkpoint::add_file(const std::string& path, Problems& problems) {
  File file{.path = path, .fd = UniqueFd(::open(path.c_str(), O_RDONLY | O_CLOEXEC))};
  if (!file.fd.valid()) {
    problems.add({.what = "cannot open the weight file", .where = path,
                  .found = std::strerror(errno)});
    return;
  }
  // Reads are large and exact; read-ahead would fetch the rows of other ranks.
  (void)::posix_fadvise(file.fd.get(), 0, 0, POSIX_FADV_RANDOM);
  const int number = static_cast<int>(files_.size());
  auto entries = read_safetensors_header(file.fd.get(), path, problems);
  files_.push_back(std::move(file));
  for (TensorEntry& entry : entries) {
    entry.file = number;
    const std::string name = entry.name;
    const auto [at, inserted] = tensors_.emplace(name, std::move(entry));
    if (!inserted)
      problems.add({.what = "tensor in two files",
                    .where = fmt::format("{}: tensor {}", path, name),
                    .found = fmt::format("also in {}", path_of(at->second))});
  }
}

void Checkpoint::add_indexed(const std::string& index_path, Problems& problems) {
  nlohmann::json index;
  try {
    index = read_json_file(index_path, kMaxIndexBytes, 16);
  } catch (const Error& e) {
    problems.add({.what = e.what(), .where = "index of the checkpoint"});
    return;
  }
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    problems.add({.what = "no weight_map", .where = index_path,
                  .expected = "an object weight_map from tensor names to file names"});
    return;
  }
  std::map<std::string, std::vector<std::string>> names_of;  // file -> tensors
  for (const auto& [name, file] : index["weight_map"].items()) {
    if (!file.is_string() || !is_plain_file_name(file.get<std::string>())) {
      problems.add({.what = "not a file of this directory",
                    .where = fmt::format("{}: weight_map.{}", index_path, name),
                    .found = file.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace),
                    .expected = "a file name without directories"});
      continue;
    }
    names_of[file.get<std::string>()].push_back(name);
  }
  for (const auto& [file, names] : names_of) {
    const std::string path = directory_ + "/" + file;
    if (!exists(path)) {
      problems.add({.what = "weight file missing", .where = path,
                    .found = std::strerror(errno),
                    .expected = fmt::format("a file with {} tensors, as {} says", names.size(),
                                            index_path),
                    .fix = "fetch the file"});
      continue;
    }
    const size_t before = problems.list().size();
    add_file(path, problems);
    if (problems.list().size() != before) continue;
    for (const std::string& name : names) {
      const TensorEntry* entry = find(name);
      if (entry == nullptr || path_of(*entry) != path)
        problems.add({.what = "tensor named by the index is absent",
                      .where = fmt::format("{}: tensor {}", path, name),
                      .expected = fmt::format("as {} says", index_path)});
    }
  }
}

const TensorEntry* Checkpoint::find(std::string_view name) const {
  const auto at = tensors_.find(name);
  return at == tensors_.end() ? nullptr : &at->second;
}

void Checkpoint::replace(const std::string& name, std::vector<TensorEntry> views,
                         Problems& problems) {
  const auto at = tensors_.find(name);
  PHALANX_CHECK(at != tensors_.end());
  const TensorEntry whole = at->second;
  tensors_.erase(at);
  for (TensorEntry& view : views) {
    PHALANX_CHECK(view.file == whole.file && view.offset >= whole.offset &&
                  view.offset + view.bytes <= whole.offset + whole.bytes);
    std::string key = view.name;
    if (!tensors_.emplace(key, std::move(view)).second)
      problems.add({.what = "tensor stored twice",
                    .where = path_of(whole) + ": tensor " + name,
                    .found = key + ", also by itself",
                    .expected = "one of the two"});
  }
}

}  // namespace phalanx::weights
