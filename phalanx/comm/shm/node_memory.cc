#include "phalanx/comm/shm/node_memory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <ctime>

#include "phalanx/comm/bootstrap.h"
#include "phalanx/comm/frame.h"

namespace phalanx::comm {

namespace {

// Two slots of a rank fit a private L2 cache.
constexpr int64_t kSlotBytes = 256 << 10;
constexpr int64_t kPage = 4096;
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

static_assert(std::atomic<uint32_t>::is_always_lock_free);

int64_t pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
int64_t lines_offset() { return pages(sizeof(NodeHeader)); }
int64_t infos_offset(int ranks) { return lines_offset() + pages(ranks * sizeof(RankLine)); }
int64_t slots_offset(int ranks) { return infos_offset(ranks) + pages(ranks * sizeof(RankInfo)); }

}  // namespace

void futex_wait(std::atomic<uint32_t>* word, uint32_t seen, int slice_ms) {
  const timespec slice{slice_ms / 1000, (slice_ms % 1000) * 1'000'000L};
  ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT, seen, &slice, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>* word) {
  ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

int64_t NodeMemory::bytes_for(int local_ranks) {
  return slots_offset(local_ranks) + int64_t{2} * local_ranks * kSlotBytes;
}

UniqueFd create_node_memory(int local_ranks) {
  if (local_ranks < 1 || local_ranks > kMaxLocalRanks)
    throw Error(Code::kInvalidArgument,
                fmt::format("shared memory of a node: found {} local ranks, expected 1 to {}",
                            local_ranks, kMaxLocalRanks));
  const int64_t bytes = NodeMemory::bytes_for(local_ranks);
  UniqueFd fd(::memfd_create("phalanx-node", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid() || ::ftruncate(fd.get(), bytes) != 0)
    throw Error(Code::kResourceExhausted,
                fmt::format("cannot create {} bytes of shared memory for {} local ranks: {} "
                            "(errno {})",
                            bytes, local_ranks, std::strerror(errno), errno));
  NodeHeader header{};
  header.magic = kNodeMagic;
  header.version = kWireVersion;
  header.local_ranks = static_cast<uint32_t>(local_ranks);
  header.slot_bytes = kSlotBytes;
  header.total_bytes = static_cast<uint64_t>(bytes);
  if (::pwrite(fd.get(), &header, sizeof header, 0) != sizeof header ||
      ::fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0)
    throw Error(Code::kResourceExhausted,
                fmt::format("cannot prepare shared memory for {} local ranks: {} (errno {})",
                            local_ranks, std::strerror(errno), errno));
  return fd;
}

NodeMemory::NodeMemory(int fd, int local_ranks) : local_ranks_(local_ranks) {
  struct stat status {};
  const int64_t expected = bytes_for(local_ranks);
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (seals < 0 || ::fstat(fd, &status) != 0)
    throw Error(Code::kFailedPrecondition,
                fmt::format("shared memory of the node: descriptor {} is not a memfd: {} (errno "
                            "{}). Fix: pass the descriptor of create_node_memory()",
                            fd, std::strerror(errno), errno));
  if ((seals & kSeals) != kSeals || status.st_size != expected)
    throw Error(Code::kFailedPrecondition,
                fmt::format("shared memory of the node: found {} bytes with seals {:#x}, expected "
                            "{} bytes with seals {:#x} for {} local ranks. Fix: create it with "
                            "the number of ranks of this node",
                            status.st_size, seals, expected, kSeals, local_ranks));
  void* map = ::mmap(nullptr, expected, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  if (map == MAP_FAILED)
    throw Error(Code::kResourceExhausted,
                fmt::format("cannot map {} bytes of the node's shared memory: {} (errno {})",
                            expected, std::strerror(errno), errno));
  base_ = static_cast<std::byte*>(map);
  total_bytes_ = expected;
  header_ = reinterpret_cast<NodeHeader*>(base_);
  if (header_->magic != kNodeMagic || header_->version != kWireVersion ||
      header_->local_ranks != static_cast<uint32_t>(local_ranks) ||
      header_->slot_bytes != static_cast<uint64_t>(kSlotBytes)) {
    const auto version = header_->version;
    const auto ranks = header_->local_ranks;
    ::munmap(base_, total_bytes_);
    throw Error(Code::kFailedPrecondition,
                fmt::format("shared memory of the node: found version {} for {} local ranks, "
                            "expected version {} for {}. Fix: run the same build on all ranks",
                            version, ranks, kWireVersion, local_ranks));
  }
  slot_bytes_ = kSlotBytes;
  lines_ = reinterpret_cast<RankLine*>(base_ + lines_offset());
  infos_ = reinterpret_cast<RankInfo*>(base_ + infos_offset(local_ranks));
  slots_ = base_ + slots_offset(local_ranks);
}

NodeMemory::~NodeMemory() { ::munmap(base_, total_bytes_); }

void NodeMemory::abort(const Fault& fault) noexcept {
  uint32_t none = 0;
  if (header_->abort_state.compare_exchange_strong(none, 1, std::memory_order_acq_rel)) {
    header_->code = static_cast<int32_t>(fault.code);
    header_->culprit = fault.culprit;
    const size_t count = std::min(fault.text.size(), sizeof header_->text - 1);
    std::memcpy(header_->text, fault.text.data(), count);
    header_->text[count] = '\0';
    header_->abort_state.store(2, std::memory_order_release);
  }
  for (int local = 0; local < local_ranks_; ++local) futex_wake_all(&lines_[local].word);
}

std::optional<Fault> NodeMemory::fault() const {
  uint32_t state = header_->abort_state.load(std::memory_order_acquire);
  if (state == 0) return std::nullopt;
  // The writer may have died between the two steps.
  for (int i = 0; state != 2 && i < 100; ++i) {
    ::usleep(100);
    state = header_->abort_state.load(std::memory_order_acquire);
  }
  if (state != 2)
    return Fault{Code::kAborted, -1, "a rank of this node ended the group and died doing so"};
  return Fault{static_cast<Code>(header_->code), header_->culprit,
               std::string(header_->text, ::strnlen(header_->text, sizeof header_->text))};
}

}  // namespace phalanx::comm
