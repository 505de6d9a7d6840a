#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "phalanx/base/unique_fd.h"
#include "phalanx/net/tls_context.h"

namespace phalanx::net {

// TLS over a connected non-blocking socket, for bulk data: full records, several to one system call,
// buffers that are kept, fresh keys before AES-GCM's limit. Nothing blocks. One thread at a time.
class TlsStream {
 public:
  enum class State { kDone, kWantsRead, kWantsWrite, kFailed };

  TlsStream(const TlsContext& context, UniqueFd fd);
  ~TlsStream();
  TlsStream(const TlsStream&) = delete;
  TlsStream& operator=(const TlsStream&) = delete;

  // To be called until it is done or has failed, when the socket is ready for what it wants.
  State handshake();
  // After the handshake, with mutual authentication.
  [[nodiscard]] std::optional<Certificate> peer() const;

  // Takes as much as fits. Bytes moved, 0 for "not now", -1 when the connection has failed or ended.
  // Bytes count as sent when the socket has taken all of their records; until then the next call
  // must bring the same bytes again.
  int64_t send_some(std::span<const iovec> runs);
  int64_t recv_some(std::span<const iovec> runs);
  // Whether records wait that the socket did not take.
  [[nodiscard]] bool unsent() const { return sent_ < out_.size(); }

  [[nodiscard]] int fd() const { return fd_.get(); }
  // After a failure: errno's or TLS's words, and this side's own verdict on the peer's certificate.
  [[nodiscard]] std::string why() const;
  // The peer closed the connection without an error or an alert.
  [[nodiscard]] bool closed_quietly() const { return ended_ && error_ == 0 && failure_.empty(); }
  // The handshake failed because this side refused the peer's certificate.
  [[nodiscard]] bool refused() const;

 private:
  friend int stream_write(void* stream, const char* bytes, size_t size, size_t* written);
  friend int stream_read(void* stream, char* bytes, size_t size, size_t* read);
  bool flush();
  bool encrypt(const void* bytes, size_t size);
  void note_failure(int result);

  UniqueFd fd_;
  ssl_st* ssl_ = nullptr;
  std::vector<char> out_;       // records, encrypted
  size_t sent_ = 0;             // of out_
  int64_t unreported_ = 0;      // plain bytes in out_
  std::vector<char> record_;    // runs too short for a record of their own
  uint64_t records_ = 0;        // under the current key
  bool ended_ = false;
  int error_ = 0;
  std::string failure_;
};

}  // namespace phalanx::net
