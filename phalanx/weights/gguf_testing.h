#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace phalanx::weights {

// Puts together GGUF files for tests, also wrong ones.
struct GgufBytes {
  struct Tensor {
    std::string name;
    std::vector<uint64_t> dimensions;  // as in the file: innermost first
    uint32_t type = 0;
    uint64_t offset = 0;
    std::string data;
  };
  uint32_t version = 3;
  uint64_t claimed_tensors = 0;  // 0: the true number
  uint64_t claimed_values = 0;
  std::vector<std::string> values;
  std::vector<Tensor> tensors;

  template <typename T>
  static std::string number(T value) {
    std::string bytes(sizeof(T), '\0');
    std::memcpy(bytes.data(), &value, sizeof(T));
    return bytes;
  }
  static std::string sized(const std::string& text) { return number<uint64_t>(text.size()) + text; }

  void raw(const std::string& key, uint32_t type, const std::string& value) {
    values.push_back(sized(key) + number(type) + value);
  }
  void u32(const std::string& key, uint32_t value) { raw(key, 4, number(value)); }
  void f32(const std::string& key, float value) { raw(key, 6, number(value)); }
  void flag(const std::string& key, bool value) {
    raw(key, 7, std::string(1, value ? '\1' : '\0'));
  }
  void text(const std::string& key, const std::string& value) { raw(key, 8, sized(value)); }
  void texts(const std::string& key, const std::vector<std::string>& list) {
    std::string value = number<uint32_t>(8) + number<uint64_t>(list.size());
    for (const std::string& item : list) value += sized(item);
    raw(key, 9, value);
  }
  void integers(const std::string& key, const std::vector<int32_t>& list) {
    std::string value = number<uint32_t>(5) + number<uint64_t>(list.size());
    for (const int32_t item : list) value += number(item);
    raw(key, 9, value);
  }
  // Shape outermost first; f32.
  void tensor(const std::string& name, const std::vector<int64_t>& shape,
              const std::vector<float>& data) {
    Tensor t{.name = name};
    t.dimensions.assign(shape.rbegin(), shape.rend());
    t.data.resize(data.size() * sizeof(float));
    std::memcpy(t.data.data(), data.data(), t.data.size());
    t.offset = tensors.empty() ? 0 : padded(tensors.back().offset + tensors.back().data.size());
    tensors.push_back(std::move(t));
  }
  static uint64_t padded(uint64_t at) { return (at + 31) / 32 * 32; }

  [[nodiscard]] std::string bytes() const {
    std::string out = "GGUF" + number(version) +
                      number(claimed_tensors ? claimed_tensors : uint64_t{tensors.size()}) +
                      number(claimed_values ? claimed_values : uint64_t{values.size()});
    for (const std::string& value : values) out += value;
    for (const Tensor& t : tensors) {
      out += sized(t.name) + number(static_cast<uint32_t>(t.dimensions.size()));
      for (const uint64_t dimension : t.dimensions) out += number(dimension);
      out += number(t.type) + number(t.offset);
    }
    out.resize(padded(out.size()), '\0');
    for (const Tensor& t : tensors) {
      out.resize(padded(out.size()), '\0');
      out += t.data;
    }
    return out;
  }
};

}  // namespace phalanx::weights
