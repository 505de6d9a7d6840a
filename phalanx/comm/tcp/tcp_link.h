#pragma once

#include <atomic>

#include "phalanx/base/unique_fd.h"
#include "phalanx/comm/link.h"

namespace phalanx::comm {

// A connected, authenticated TCP socket, in clear.
class TcpLink final : public Link {
 public:
  // `fd` is non-blocking and belongs to the link.
  TcpLink(UniqueFd fd, uint64_t generation);

  int64_t send_some(std::span<const iovec> runs) override;
  int64_t recv_some(std::span<const iovec> runs) override;
  [[nodiscard]] std::string why() const override;
  [[nodiscard]] bool begin_frame() override;
  void end_frame() override;
  [[nodiscard]] int fd() const override { return fd_.get(); }
  [[nodiscard]] short events(bool receiving, bool sending) const override;
  Peer look(Farewell* farewell) override;
  void farewell(const FarewellFrame& frame) noexcept override;

 private:
  enum class State { kIdle, kWriting, kClosed };

  UniqueFd fd_;
  uint64_t generation_;
  int error_ = 0;  // errno of the failure, 0 for an orderly end
  std::atomic<State> state_{State::kIdle};
};

}  // namespace phalanx::comm
