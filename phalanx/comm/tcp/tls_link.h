#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "phalanx/comm/link.h"
#include "phalanx/net/tls_stream.h"

namespace phalanx::comm {

// A connected, authenticated TCP socket under TLS 1.3.
class TlsLink final : public Link {
 public:
  // `stream` has done its handshake.
  TlsLink(std::unique_ptr<net::TlsStream> stream, uint64_t generation);

  int64_t send_some(std::span<const iovec> runs) override;
  int64_t recv_some(std::span<const iovec> runs) override;
  [[nodiscard]] std::string why() const override;
  [[nodiscard]] bool begin_frame() override;
  void end_frame() override;
  [[nodiscard]] int fd() const override { return stream_->fd(); }
  [[nodiscard]] short events(bool receiving, bool sending) const override;
  Peer look(Farewell* farewell) override;
  void farewell(const FarewellFrame& frame) noexcept override;

 private:
  enum class State { kIdle, kWriting, kClosed };

  mutable std::mutex mutex_;  // a TLS connection is one object for both directions
  std::unique_ptr<net::TlsStream> stream_;  // guarded by mutex_, but for fd()
  std::vector<std::byte> ahead_;  // guarded by mutex_: decrypted by look(), not yet received
  size_t ahead_taken_ = 0;        // guarded by mutex_
  uint64_t generation_;
  std::atomic<State> state_{State::kIdle};
};

}  // namespace phalanx::comm
