#include "phalanx/net/tls_stream.h"

#include <fmt/format.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "phalanx/base/check.h"
#include "phalanx/net/openssl_handles.h"

namespace phalanx::net {

namespace {

constexpr size_t kRecord = 16 << 10;    // plain bytes of a full record
constexpr size_t kBatch = 4 * kRecord;  // encrypted before the socket sees them: the peer decrypts
                                        // them while this side encrypts the next
constexpr size_t kReadBuffer = 128 << 10;
// AES-GCM is sound for 2^24.5 full records under one key (RFC 8446, 5.5).
constexpr uint64_t kRecordsPerKey = uint64_t{1} << 22;

}  // namespace

int stream_write(void* owner, const char* bytes, size_t size, size_t* written) {
  auto* stream = static_cast<TlsStream*>(owner);
  stream->out_.insert(stream->out_.end(), bytes, bytes + size);
  *written = size;
  return 1;
}

int stream_read(void* owner, char* bytes, size_t size, size_t* read) {
  auto* stream = static_cast<TlsStream*>(owner);
  ssize_t count = 0;
  do {
    count = ::recv(stream->fd_.get(), bytes, size, MSG_DONTWAIT);
  } while (count < 0 && errno == EINTR);
  if (count > 0) {
    *read = static_cast<size_t>(count);
    return 1;
  }
  if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return 0;
  stream->ended_ = true;
  if (count < 0) stream->error_ = errno;
  return 0;
}

namespace {

int bio_write(BIO* bio, const char* bytes, size_t size, size_t* written) {
  return stream_write(BIO_get_data(bio), bytes, size, written);
}

int bio_read(BIO* bio, char* bytes, size_t size, size_t* read) {
  BIO_clear_retry_flags(bio);
  if (stream_read(BIO_get_data(bio), bytes, size, read) == 1) return 1;
  BIO_set_retry_read(bio);  // the stream knows an end from "not now"
  return -1;
}

long bio_control(BIO*, int command, long, void*) {
  return command == BIO_CTRL_FLUSH || command == BIO_CTRL_PUSH || command == BIO_CTRL_POP ? 1 : 0;
}

// One method for all streams: its address is the type, it is never freed.
BIO_METHOD* bio_method() {
  static BIO_METHOD* const method = [] {
    BIO_METHOD* made = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "phalanx stream");
    PHALANX_CHECK(made != nullptr);
    BIO_meth_set_write_ex(made, bio_write);
    BIO_meth_set_read_ex(made, bio_read);
    BIO_meth_set_ctrl(made, bio_control);
    return made;
  }();
  return method;
}

}  // namespace

TlsStream::TlsStream(const TlsContext& context, UniqueFd fd)
    : fd_(std::move(fd)), ssl_(SSL_new(context.native())) {
  PHALANX_CHECK(ssl_ != nullptr);
  BIO* const bio = BIO_new(bio_method());
  PHALANX_CHECK(bio != nullptr);
  BIO_set_data(bio, this);
  BIO_set_init(bio, 1);
  SSL_set_bio(ssl_, bio, bio);
  SSL_clear_mode(ssl_, SSL_MODE_RELEASE_BUFFERS);
  SSL_set_read_ahead(ssl_, 1);
  SSL_set_default_read_buffer_len(ssl_, kReadBuffer);
  if (context.side() == TlsContext::Side::kServer)
    SSL_set_accept_state(ssl_);
  else
    SSL_set_connect_state(ssl_);
}

TlsStream::~TlsStream() { SSL_free(ssl_); }

bool TlsStream::flush() {
  while (sent_ < out_.size()) {
    const ssize_t count = ::send(fd_.get(), out_.data() + sent_, out_.size() - sent_,
                                 MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != EWOULDBLOCK) {
        error_ = errno;
        ended_ = true;
      }
      return false;
    }
    sent_ += static_cast<size_t>(count);
  }
  out_.clear();
  sent_ = 0;
  return true;
}

void TlsStream::note_failure(int result) {
  const int kind = SSL_get_error(ssl_, result);
  if (kind == SSL_ERROR_ZERO_RETURN) ended_ = true;
  if (failure_.empty() && kind == SSL_ERROR_SSL) {
    ended_ = true;
    const unsigned long code = ERR_peek_error();
    const char* reason = ERR_reason_error_string(code);
    failure_ = reason != nullptr ? reason : "protocol error";
  }
  ERR_clear_error();
}

TlsStream::State TlsStream::handshake() {
  if (!flush()) return ended_ ? State::kFailed : State::kWantsWrite;
  ERR_clear_error();
  const int result = SSL_do_handshake(ssl_);
  if (result != 1) note_failure(result);
  // An alert, or the last flight, is in out_.
  const bool flushed = flush();
  if (result == 1) {
    if (ended_) return State::kFailed;
    return flushed ? State::kDone : State::kWantsWrite;
  }
  if (ended_ || !failure_.empty()) return State::kFailed;
  return flushed ? State::kWantsRead : State::kWantsWrite;
}

std::optional<Certificate> TlsStream::peer() const { return peer_certificate(ssl_); }

bool TlsStream::encrypt(const void* bytes, size_t size) {
  if (++records_ == kRecordsPerKey) {
    records_ = 0;
    if (SSL_key_update(ssl_, SSL_KEY_UPDATE_NOT_REQUESTED) != 1) ERR_clear_error();
  }
  ERR_clear_error();
  size_t written = 0;
  const int result = SSL_write_ex(ssl_, bytes, size, &written);
  if (result == 1 && written == size) return true;
  note_failure(result);
  ended_ = true;
  return false;
}

int64_t TlsStream::send_some(std::span<const iovec> runs) {
  if (ended_) return -1;
  if (unsent()) {
    if (!flush()) return ended_ ? -1 : 0;
    return std::exchange(unreported_, 0);
  }
  int64_t taken = 0;
  size_t gathered = 0;
  record_.resize(kRecord);
  for (size_t i = 0; i < runs.size() && out_.size() < kBatch; ++i) {
    const char* bytes = static_cast<const char*>(runs[i].iov_base);
    size_t left = runs[i].iov_len;
    while (left > 0 && out_.size() < kBatch) {
      const size_t count = std::min(left, kRecord - gathered);
      if (gathered == 0 && count == kRecord) {
        if (!encrypt(bytes, count)) return -1;
      } else {
        std::memcpy(record_.data() + gathered, bytes, count);
        gathered += count;
        if (gathered == kRecord) {
          if (!encrypt(record_.data(), gathered)) return -1;
          gathered = 0;
        }
      }
      bytes += count;
      left -= count;
      taken += static_cast<int64_t>(count);
    }
  }
  if (gathered > 0 && !encrypt(record_.data(), gathered)) return -1;
  if (flush()) return taken;
  unreported_ = taken;
  return ended_ ? -1 : 0;
}

int64_t TlsStream::recv_some(std::span<const iovec> runs) {
  int64_t taken = 0;
  for (const iovec& run : runs) {
    size_t done = 0;
    while (done < run.iov_len) {
      size_t count = 0;
      ERR_clear_error();
      const int result =
          SSL_read_ex(ssl_, static_cast<char*>(run.iov_base) + done, run.iov_len - done, &count);
      if (result != 1) {
        note_failure(result);
        taken += static_cast<int64_t>(done);
        if (taken > 0) return taken;
        return ended_ ? -1 : 0;
      }
      done += count;
    }
    taken += static_cast<int64_t>(done);
  }
  return taken;
}

bool TlsStream::refused() const { return !refusal(ssl_).empty(); }

std::string TlsStream::why() const {
  const std::string refused = refusal(ssl_);
  if (!refused.empty()) return "its certificate was refused: " + refused;
  if (error_ != 0)
    return fmt::format("the connection failed: {} (errno {})", std::strerror(error_), error_);
  if (!failure_.empty()) return "TLS: " + failure_;
  return "the connection was closed";
}

}  // namespace phalanx::net
