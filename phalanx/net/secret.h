#pragma once

#include <cstddef>
#include <string_view>
#include <utility>

namespace phalanx::net {

// Bytes that nobody else should read: one owner, overwritten when they go.
class Secret {
 public:
  Secret() = default;
  explicit Secret(std::string_view bytes);
  explicit Secret(size_t size);  // zeros, to be filled through data()
  Secret(Secret&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Secret& operator=(Secret&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Secret();

  [[nodiscard]] std::string_view view() const { return {data_, size_}; }
  [[nodiscard]] char* data() { return data_; }
  [[nodiscard]] size_t size() const { return size_; }
  [[nodiscard]] bool empty() const { return size_ == 0; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

// Overwrites `text` in a way the compiler keeps, then clears it.
void wipe(std::string& text);

// Once, early in main, before a key is loaded: private numbers of keys go to memory that is never
// swapped or dumped, as far as the limit of locked memory allows, and a core dump holds no memory
// of this process or its children.
void protect_keys();

}  // namespace phalanx::net
