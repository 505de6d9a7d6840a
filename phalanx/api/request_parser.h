#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "phalanx/api/http_message.h"

namespace phalanx::api {

// Reads one request out of bytes that come in pieces of any size. Not thread-safe.
class RequestParser {
 public:
  struct Limits {
    size_t head_bytes = 65536;
    size_t head_line_bytes = 16384;
    int64_t body_bytes = 40 << 20;
  };
  enum class State {
    kHead,       // the head is not complete
    kBody,       // the head is, the body is not
    kDone,       // take() it
    kMalformed,  // 400, see reason()
    kHeadTooLarge,
    kBodyTooLarge,
  };

  explicit RequestParser(const Limits& limits);
  ~RequestParser();

  // Takes bytes from the front of `input` and says in `used` how many; what follows the request is
  // left. After anything but kHead and kBody it takes no more.
  State put(std::span<const char> input, size_t* used);
  [[nodiscard]] const std::string& reason() const;
  // The client waits for "100 Continue" before it sends the body. From kBody on.
  [[nodiscard]] bool expects_continue() const;
  // From kBody on.
  [[nodiscard]] bool keep_alive() const;
  [[nodiscard]] bool http10() const;
  // The request without its body. From kBody on.
  [[nodiscard]] HttpRequest head() const;
  // After kDone, once. Without `peer`, `id` and `user`.
  [[nodiscard]] HttpRequest take();

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace phalanx::api
