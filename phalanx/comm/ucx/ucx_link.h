#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "phalanx/comm/link.h"

namespace phalanx::comm {

// A link whose bytes travel as a stream between two UCX endpoints, and whose `channel`, the proved link
// that it grew from, tells of the peer's end.
class UcxLink : public Link {
 public:
  // Makes this side's endpoint. Value: why that cannot be, or "". Before it nothing can be moved.
  virtual std::string connect(const std::vector<std::byte>& address) = 0;
  [[nodiscard]] virtual Link& channel() = 0;
};

// What UCX needs once for all links of a rank. Not for several threads at once.
class UcxWorker {
 public:
  static constexpr size_t kMaxAddressBytes = 64 << 10;

  // On the devices that carry `data_address`, unless the environment names others. Loads UCX. Throws
  // Error that says what UCX was told and what it answered.
  static std::shared_ptr<UcxWorker> open(const std::string& data_address);
  virtual ~UcxWorker() = default;

  // By which others reach this worker; at most kMaxAddressBytes.
  [[nodiscard]] virtual std::vector<std::byte> address() const = 0;
  // The link keeps the worker alive.
  virtual std::unique_ptr<UcxLink> link(std::unique_ptr<Link> channel) = 0;
  // Moves what can be moved, of all links.
  virtual void progress() = 0;
  // As Link::prepare_sleep() and wake_fd().
  virtual bool arm() = 0;
  [[nodiscard]] virtual int wake_fd() const = 0;
  // The devices and transports it was told, for messages.
  [[nodiscard]] virtual std::string settings() const = 0;
  [[nodiscard]] virtual std::array<uint32_t, 3> version() const = 0;  // of UCX
};

[[nodiscard]] std::string ucx_version_text(const std::array<uint32_t, 3>& version);

}  // namespace phalanx::comm
