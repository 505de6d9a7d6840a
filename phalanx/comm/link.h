#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <span>
#include <string>

#include "phalanx/comm/frame.h"

namespace phalanx::comm {

// One ordered byte pipe to one peer. Nothing blocks. One thread sends and receives; farewell() may
// come from any thread. An encrypted pipe is another implementation: the collectives see only this.
class Link {
 public:
  enum class Peer {
    kAlive,
    kLeft,    // said a clean farewell
    kGone,    // closed or failed without one, or with the fault that look() returned
    kUnread,  // closed, but too much unread data lies before the end to tell how
  };

  virtual ~Link() = default;

  // Takes as much as fits. Returns bytes moved, 0 for "not now", -1 when the pipe has failed or
  // the peer closed it; why() then tells.
  virtual int64_t send_some(std::span<const iovec> runs) = 0;
  virtual int64_t recv_some(std::span<const iovec> runs) = 0;
  [[nodiscard]] virtual std::string why() const = 0;

  // A frame is being written from begin_frame() to end_frame(); a farewell cannot cut into it.
  // begin_frame() is false once farewell() was called.
  [[nodiscard]] virtual bool begin_frame() = 0;
  virtual void end_frame() = 0;

  // For poll(): descriptor and the events to ask for. POLLRDHUP tells that the peer closed.
  [[nodiscard]] virtual int fd() const = 0;
  [[nodiscard]] virtual short events(bool receiving, bool sending) const = 0;

  // Of a pipe whose bytes come by another way than fd(): what becomes readable when bytes may have
  // come or gone; -1 else. Before a sleep on it prepare_sleep() is asked: false if something has
  // happened already, so that one must look first.
  [[nodiscard]] virtual int wake_fd() const { return -1; }
  [[nodiscard]] virtual bool prepare_sleep() { return true; }

  // Whether the peer is still there, without consuming anything. Fills `farewell` for kLeft, and
  // for kGone if the peer said why (else fault.text stays empty).
  virtual Peer look(Farewell* farewell) = 0;

  // Any thread: the peer is told (if no frame is half written) and the pipe is shut for both sides.
  virtual void farewell(const FarewellFrame& frame) noexcept = 0;
};

}  // namespace phalanx::comm
