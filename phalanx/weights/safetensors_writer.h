#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "phalanx/base/unique_fd.h"
#include "phalanx/tensor/dtype.h"

namespace phalanx::weights {

struct NewTensor {
  std::string name;
  tensor::DType dtype = tensor::DType::kF32;
  std::vector<int64_t> shape;

  [[nodiscard]] int64_t bytes() const;
};

// Writes one safetensors file from front to back, so that no more than the caller's piece is in
// memory. The file has mode 0640 and carries a temporary name (path + ".part") until finish(); a
// writer that is destroyed before removes it.
class SafetensorsWriter {
 public:
  // The tensors' data follow in this order. Throws kUnavailable with errno's text.
  SafetensorsWriter(std::string path, std::vector<NewTensor> entries);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  // The next bytes of the data; pieces may be cut anywhere.
  void append(std::span<const std::byte> bytes);
  // All bytes must have come. Flushes to the disk and gives the file its name.
  void finish();

 private:
  std::string path_;
  std::string part_;
  UniqueFd fd_;
  int64_t expected_ = 0;
  int64_t written_ = 0;
  bool finished_ = false;
};

struct CheckpointShard {
  std::string file_name;  // model.safetensors, or model-00001-of-00003.safetensors
  std::vector<NewTensor> entries;
};

// Cuts the tensors, in their order, into files of at most `max_bytes` (one tensor at least each).
[[nodiscard]] std::vector<CheckpointShard> plan_shards(std::vector<NewTensor> entries,
                                                       int64_t max_bytes);
// The text of model.safetensors.index.json.
[[nodiscard]] std::string shard_index(const std::vector<CheckpointShard>& shards);

// A small file, mode 0640, through a temporary name and rename. Throws kUnavailable.
void write_file(const std::string& path, std::string_view content);

}  // namespace phalanx::weights
