#include "phalanx/weights/weight_source.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "phalanx/base/check.h"
#include "phalanx/base/log.h"

namespace phalanx::weights {

const TensorEntry& WeightSource::ask(std::string_view name) {
  const TensorEntry* entry = checkpoint_.find(name);
  if (entry == nullptr)
    throw Error(Code::kNotFound,
                fmt::format("{}: tensor {} is absent", checkpoint_.directory(), name));
  const std::lock_guard lock(mutex_);
  asked_.emplace(name);
  return *entry;
}

void WeightSource::read_rows(const TensorEntry& entry, int64_t row_begin, int64_t rows,
                             std::byte* out) {
  PHALANX_CHECK(row_begin >= 0 && rows >= 0 && row_begin + rows <= entry.rows());
  read(entry, entry.offset + row_begin * entry.row_bytes(), rows * entry.row_bytes(), out);
}

void WeightSource::read_columns(const TensorEntry& entry, int64_t begin, int64_t bytes,
                                std::byte* out) {
  PHALANX_CHECK(begin >= 0 && bytes >= 0 && begin + bytes <= entry.row_bytes());
  if (bytes == entry.row_bytes()) return read(entry, entry.offset, entry.bytes, out);
  for (int64_t row = 0; row < entry.rows(); ++row)
    read(entry, entry.offset + row * entry.row_bytes() + begin, bytes, out + row * bytes);
}

void WeightSource::read(const TensorEntry& entry, int64_t offset, int64_t left, std::byte* out) {
  while (left > 0) {
    const iovec part{.iov_base = out,
                     .iov_len = static_cast<size_t>(std::min<int64_t>(left, 1 << 30))};
    // Asks for what is there without waiting, to learn whether the disk is needed at all.
    const int flags = from_disk_.load(std::memory_order_relaxed) ? 0 : RWF_NOWAIT;
    const ssize_t n = ::preadv2(checkpoint_.fd_of(entry), &part, 1, offset, flags);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && flags != 0) {  // not cached, or a file system that does not tell
      from_disk_.store(true, std::memory_order_relaxed);
      continue;
    }
    if (n < 0)
      throw Error(Code::kUnavailable,
                  fmt::format("{}: tensor {}: cannot read {} bytes at {}: {}",
                              checkpoint_.path_of(entry), entry.name, left, offset,
                              std::strerror(errno)));
    if (n == 0)
      throw Error(Code::kDataLoss,
                  fmt::format("{}: tensor {}: file ends at {}, expected {} more bytes. Fix: the file "
                              "changed while it was read; restore it and start again",
                              checkpoint_.path_of(entry), entry.name, offset, left));
    out += n;
    offset += n;
    left -= n;
    bytes_read_.fetch_add(n, std::memory_order_relaxed);
  }
}

bool WeightSource::cached(const TensorEntry& entry, int64_t offset) const {
  std::byte one{};
  const iovec part{.iov_base = &one, .iov_len = 1};
  return ::preadv2(checkpoint_.fd_of(entry), &part, 1, offset, RWF_NOWAIT) >= 0;
}

void WeightSource::will_read_rows(const TensorEntry& entry, int64_t row_begin, int64_t rows) {
  const int64_t offset = entry.offset + row_begin * entry.row_bytes();
  const int64_t bytes = rows * entry.row_bytes();
  if (bytes == 0 || (cached(entry, offset) && cached(entry, offset + bytes - 1))) return;
  (void)::posix_fadvise(checkpoint_.fd_of(entry), offset, bytes, POSIX_FADV_WILLNEED);
}

int64_t WeightSource::tensors_asked() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int64_t>(asked_.size());
}

std::vector<std::string> WeightSource::finish(
    const std::function<bool(std::string_view)>& known) {
  std::vector<std::string> left;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [name, entry] : checkpoint_.tensors()) {
      if (!asked_.contains(name) && !known(name)) left.push_back(name);
    }
  }
  if (!left.empty()) {
    const std::vector<std::string> shown(left.begin(),
                                         left.begin() + static_cast<long>(std::min<size_t>(left.size(), 8)));
    log_warn("{}: {} tensors were not used by the model: {}{}", checkpoint_.directory(), left.size(),
             fmt::join(shown, ", "), left.size() > shown.size() ? ", ..." : "");
  }
  return left;
}

}  // namespace phalanx::weights
