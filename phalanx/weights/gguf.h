#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "phalanx/base/unique_fd.h"
#include "phalanx/weights/gguf_blocks.h"

namespace phalanx::weights {

// A value of the metadata. Integers and booleans of all widths are int64_t, floats are double; a
// uint64 beyond int64 is refused while reading.
using GgufValue = std::variant<int64_t, double, std::string, std::vector<int64_t>,
                               std::vector<double>, std::vector<std::string>>;

struct GgufTensor {
  std::string name;
  std::vector<int64_t> shape;  // outermost first, as in Hugging Face; the file has it reversed
  GgufType type;
  int64_t offset;  // in the file
  int64_t bytes;

  [[nodiscard]] int64_t row_elements() const { return shape.back(); }
  [[nodiscard]] int64_t rows() const;  // product of all dimensions but the last
};

// A GGUF file, version 2 or 3, little-endian. Everything the header says is verified before use:
// counts and lengths against the file's size, types, shapes, alignment, that data lie inside the
// file and do not overlap. Const functions may be used by several threads.
class GgufFile {
 public:
  // Throws kNotFound, kInvalidArgument (what the file says cannot be; named with file, place and
  // numbers) or kUnimplemented (a tensor type without a decoder, by name).
  [[nodiscard]] static GgufFile open(const std::string& path);

  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] const std::vector<GgufTensor>& tensors() const { return tensors_; }
  [[nodiscard]] const GgufTensor* find_tensor(std::string_view name) const;

  // Metadata. Throw kInvalidArgument where the key has another type, or is missing without a
  // default.
  [[nodiscard]] bool has(const std::string& key) const { return metadata_.contains(key); }
  [[nodiscard]] int64_t integer(const std::string& key) const;
  [[nodiscard]] int64_t integer(const std::string& key, int64_t otherwise) const;
  [[nodiscard]] double number(const std::string& key) const;
  [[nodiscard]] double number(const std::string& key, double otherwise) const;
  [[nodiscard]] std::string text(const std::string& key) const;
  [[nodiscard]] std::string text(const std::string& key, const std::string& otherwise) const;
  // Lists; empty when missing. An integer list is also given as numbers.
  [[nodiscard]] std::vector<std::string> texts(const std::string& key) const;
  [[nodiscard]] std::vector<int64_t> integers(const std::string& key) const;
  [[nodiscard]] std::vector<double> numbers(const std::string& key) const;

  // Rows [first, first + out.size() / row_elements) as floats. `out` holds whole rows.
  void read_rows(const GgufTensor& tensor, int64_t first, std::span<float> out) const;

 private:
  friend class GgufHeaderReader;
  GgufFile() = default;
  [[nodiscard]] const GgufValue* find(const std::string& key) const;
  [[noreturn]] void wrong_type(const std::string& key, const GgufValue* found,
                               std::string_view expected) const;

  std::string path_;
  UniqueFd fd_;
  std::map<std::string, GgufValue> metadata_;
  std::vector<GgufTensor> tensors_;
};

}  // namespace phalanx::weights
