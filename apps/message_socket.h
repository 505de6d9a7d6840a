#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <utility>

#include "phalanx/base/clock.h"
#include "phalanx/base/unique_fd.h"

namespace phalanx::apps {

// Framed JSON messages between a node process and a rank it started, over a Unix stream socket:
// u32 length, then the text. One reader and one writer at a time.
class MessageSocket {
 public:
  static constexpr uint32_t kMaxBytes = 16u << 20;

  explicit MessageSocket(UniqueFd fd) : fd_(std::move(fd)) {}
  // Both CLOEXEC.
  static std::pair<UniqueFd, UniqueFd> make_pair();

  // Throws Error(kUnavailable) when the other side is gone or does not read for 10 s.
  void send(const nlohmann::json& message);
  // The next message; nullopt at the end of the stream. Throws Error(kDeadlineExceeded).
  std::optional<nlohmann::json> receive(Deadline deadline);
  [[nodiscard]] int fd() const { return fd_.get(); }

 private:
  UniqueFd fd_;
};

}  // namespace phalanx::apps
