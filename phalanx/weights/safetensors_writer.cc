#include "phalanx/weights/safetensors_writer.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>

#include "phalanx/base/check.h"
#include "phalanx/base/error.h"

namespace phalanx::weights {
namespace {

using nlohmann::ordered_json;

constexpr mode_t kFileMode = 0640;
constexpr size_t kDataAlignment = 64;

[[noreturn]] void failed(const std::string& what, const std::string& path) {
  throw Error(Code::kUnavailable,
              fmt::format("cannot {} {}: {}", what, path, std::strerror(errno)));
}

UniqueFd create(const std::string& path) {
  UniqueFd fd(
      ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, kFileMode));
  if (!fd.valid()) failed("create", path);
  if (::fchmod(fd.get(), kFileMode) != 0) failed("set the mode of", path);
  return fd;
}

void write_to(int fd, const std::string& path, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) failed("write", path);
    bytes = bytes.subspan(static_cast<size_t>(n));
  }
}

void give_name(int fd, const std::string& part, const std::string& path) {
  if (::fsync(fd) != 0) failed("flush", part);
  if (std::rename(part.c_str(), path.c_str()) != 0) failed("rename to its final name", part);
}

std::string_view stored_name(tensor::DType dtype) {
  using tensor::DType;
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kF16:
      return "F16";
    case DType::kBF16:
      return "BF16";
    case DType::kI8:
      return "I8";
    case DType::kU8:
      return "U8";
    case DType::kI16:
      return "I16";
    case DType::kI32:
      return "I32";
    case DType::kI64:
      return "I64";
    case DType::kF64:
      return "F64";
    case DType::kF8E4M3:
      return "F8_E4M3";
    case DType::kBool:
      return "BOOL";
  }
  return "?";
}

}  // namespace

int64_t NewTensor::bytes() const {
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  return elements * static_cast<int64_t>(tensor::dtype_bytes(dtype));
}

SafetensorsWriter::SafetensorsWriter(std::string path, std::vector<NewTensor> entries)
    : path_(std::move(path)), part_(path_ + ".part") {
  ordered_json header;
  header["__metadata__"] = {{"format", "pt"}};
  for (const NewTensor& entry : entries) {
    PHALANX_CHECK(!header.contains(entry.name));
    const int64_t begin = expected_;
    expected_ += entry.bytes();
    header[entry.name] = {{"dtype", stored_name(entry.dtype)},
                          {"shape", entry.shape},
                          {"data_offsets", {begin, expected_}}};
  }
  std::string text = header.dump();
  // Spaces at the end are allowed by the format and align the data.
  while ((text.size() + sizeof(uint64_t)) % kDataAlignment != 0) text += ' ';
  const uint64_t length = text.size();
  fd_ = create(part_);
  write_to(fd_.get(), part_, std::as_bytes(std::span(&length, 1)));
  write_to(fd_.get(), part_, std::as_bytes(std::span(text)));
}

SafetensorsWriter::~SafetensorsWriter() {
  if (!finished_) ::unlink(part_.c_str());
}

void SafetensorsWriter::append(std::span<const std::byte> bytes) {
  written_ += static_cast<int64_t>(bytes.size());
  PHALANX_CHECK(written_ <= expected_);
  write_to(fd_.get(), part_, bytes);
}

void SafetensorsWriter::finish() {
  PHALANX_CHECK(written_ == expected_);
  give_name(fd_.get(), part_, path_);
  finished_ = true;
}

std::vector<CheckpointShard> plan_shards(std::vector<NewTensor> entries, int64_t max_bytes) {
  std::vector<CheckpointShard> shards(1);
  int64_t filled = 0;
  for (NewTensor& entry : entries) {
    const int64_t bytes = entry.bytes();
    if (!shards.back().entries.empty() && filled + bytes > max_bytes) {
      shards.emplace_back();
      filled = 0;
    }
    filled += bytes;
    shards.back().entries.push_back(std::move(entry));
  }
  for (size_t i = 0; i < shards.size(); ++i)
    shards[i].file_name =
        shards.size() == 1 ? "model.safetensors"
                           : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
  return shards;
}

std::string shard_index(const std::vector<CheckpointShard>& shards) {
  ordered_json map = ordered_json::object();
  int64_t total = 0;
  for (const CheckpointShard& shard : shards)
    for (const NewTensor& entry : shard.entries) {
      map[entry.name] = shard.file_name;
      total += entry.bytes();
    }
  const ordered_json index = {{"metadata", {{"total_size", total}}}, {"weight_map", map}};
  return index.dump(2) + "\n";
}

void write_file(const std::string& path, std::string_view content) {
  const std::string part = path + ".part";
  const UniqueFd fd = create(part);
  write_to(fd.get(), part, std::as_bytes(std::span(content)));
  give_name(fd.get(), part, path);
}

}  // namespace phalanx::weights
