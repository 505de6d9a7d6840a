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

constexpr int64_t kPage = 4096;
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

static_assert(std::atomic<uint32_t>::is_always_lock_free);

int64_t pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
int64_t lines_offset() { return pages(sizeof(NodeHeader)); }
int64_t infos_offset(int ranks) { return lines_offset() + pages(ranks * sizeof(RankLine)); }
int64_t slots_offset(int ranks) { return infos_offset(ranks) + pages(ranks * sizeof(RankInfo)); }
int64_t bytes_for(int ranks, int64_t slot_bytes) {
  return slots_offset(ranks) + int64_t{2} * ranks * slot_bytes;
}

}  // namespace

void futex_wait(std::atomic<uint32_t>* word, uint32_t seen, int slice_ms) {
  const timespec slice{slice_ms / 1000, (slice_ms % 1000) * 1'000'000L};
  ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT, seen, &slice, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>* word) {
  ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

UniqueFd create_node_memory(int local_ranks) {
  return NodeMemory::create(local_ranks, NodeMemory::kSlotBytes);
}

UniqueFd NodeMemory::create(int local_ranks, int64_t slot_bytes) {
  if (local_ranks < 1 || local_ranks > kMaxLocalRanks)
    throw Error(Code::kInvalidArgument,
                fmt::format("shared memory of a node: found {} local ranks, expected 1 to {}",
                            local_ranks, kMaxLocalRanks));
  const int64_t bytes = bytes_for(local_ranks, slot_bytes);
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
  header.slot_bytes = static_cast<uint64_t>(slot_bytes);
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
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (seals < 0 || ::fstat(fd, &status) != 0)
    throw Error(Code::kFailedPrecondition,
                fmt::format("shared memory of the node: descriptor {} is not a memfd: {} (errno "
                            "{}). Fix: pass the descriptor of create_node_memory()",
                            fd, std::strerror(errno), errno));
  NodeHeader header{};
  const bool read = ::pread(fd, &header, sizeof header, 0) == sizeof header;
  const auto slot_bytes = static_cast<int64_t>(header.slot_bytes);
  if ((seals & kSeals) != kSeals || !read || header.magic != kNodeMagic ||
      header.version != kWireVersion || header.local_ranks != static_cast<uint32_t>(local_ranks) ||
      slot_bytes < kPage || slot_bytes > (int64_t{1} << 30) || slot_bytes % kPage != 0 ||
      status.st_size != bytes_for(local_ranks, slot_bytes))
    throw Error(Code::kFailedPrecondition,
                fmt::format("shared memory of the node: found {} bytes with seals {:#x}, version {} "
                            "for {} local ranks; expected seals {:#x}, version {} for {} local "
                            "ranks. Fix: create it with the number of ranks of this node, by the "
                            "same build",
                            status.st_size, seals, header.version, header.local_ranks, kSeals,
                            kWireVersion, local_ranks));
  void* map = ::mmap(nullptr, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (map == MAP_FAILED)
    throw Error(Code::kResourceExhausted,
                fmt::format("cannot map {} bytes of the node's shared memory: {} (errno {})",
                            status.st_size, std::strerror(errno), errno));
  base_ = static_cast<std::byte*>(map);
  total_bytes_ = status.st_size;
  header_ = reinterpret_cast<NodeHeader*>(base_);
  slot_bytes_ = slot_bytes;
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
