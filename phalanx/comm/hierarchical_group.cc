#include "phalanx/comm/hierarchical_group.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "phalanx/base/check.h"
#include "phalanx/base/log.h"
#include "phalanx/comm/algorithms.h"
#include "phalanx/comm/sum.h"
#include "phalanx/comm/tcp/address.h"
#include "phalanx/comm/tcp/connect.h"
#include "phalanx/comm/ucx/ucx.h"

namespace phalanx::comm {

namespace {

constexpr int kSliceMs = 50;
constexpr std::chrono::seconds kReportEvery{5};
constexpr int kCrowdedSpinUs = 5;  // where ranks outnumber cores, spinning takes the peer's core
// All vectors of an all_reduce together: below, every rank gets them all and adds; above, each rank
// adds its share.
constexpr int64_t kOneShotBytes = 512 << 10;
constexpr int kRingNodes = 4;
constexpr int64_t kRingBytes = 256 << 10;  // of the largest block

// Ranks of the group on this machine, itself included, as far as addresses tell.
int neighbours(const GroupOptions& options, const Topology& topology) {
  int count = 0;
  for (const Member& member : options.members)
    count += member.node == options.members[topology.rank].node ||
             is_own_address(member.data_address);
  return count;
}

}  // namespace

HierarchicalGroup::HierarchicalGroup(const GroupOptions& options, int listener, int node_memory)
    : options_(options),
      topology_(make_topology(options.members, options.rank)),
      cap_seconds_(options.connect_seconds) {
  const Deadline deadline = Deadline::in_seconds(options.connect_seconds);
  deadline_ns_ = INT64_MAX;
  const auto& nodes = topology_.nodes;
  even_ = std::all_of(nodes.begin(), nodes.end(),
                      [&](const auto& ranks) { return ranks.size() == nodes[0].size(); });
  if (even_)
    for (const auto& ranks : nodes) column_.push_back(ranks[topology_.local]);
  streams_.resize(topology_.own_node().size());
  if (neighbours(options, topology_) > ::sysconf(_SC_NPROCESSORS_ONLN))
    options_.spin_us = std::min(options_.spin_us, kCrowdedSpinUs);
  try {
    if (topology_.own_node().size() > 1) join_node(node_memory);
    Watch* const watch = this;
    const auto exchange_over = [&](std::vector<std::unique_ptr<Link>> links) {
      exchange_ = std::make_unique<Exchange>(std::move(links), topology_.names, topology_.rank,
                                             options.generation, options_.spin_us, watch);
    };
    exchange_over(connect_links(options_, topology_, listener, deadline, watch));
    if (memory_ != nullptr) {
      await_siblings(deadline);
      std::vector<std::string> names;
      for (const int rank : topology_.own_node()) names.push_back(topology_.names[rank]);
      slots_ = std::make_unique<NodeSlots>(memory_.get(), topology_.local, options_.spin_us,
                                           std::move(names), topology_.own_node(), watch);
    }
    if (options_.transport == Transport::kUcx && topology_.nodes.size() > 1)
      exchange_over(
          links_over_ucx(options_, topology_, exchange_->take_links(), deadline, watch));
    cap_seconds_ = std::chrono::duration<double>(deadline.when() - Clock::now()).count();
    self_test();
    cap_seconds_ = options.operation_seconds;
    options_.abandoned = nullptr;
  } catch (const FaultError& error) {
    end(error.fault());
    throw;
  } catch (const std::exception& error) {
    end({Code::kUnavailable, topology_.rank,
         fmt::format("{} could not join: {}", topology_.names[topology_.rank], error.what())});
    throw;
  }
}

HierarchicalGroup::~HierarchicalGroup() {
  // Siblings first: if another node fails because of this, they know better.
  if (memory_ != nullptr) {
    memory_->info(topology_.local)
        .state.store(static_cast<uint32_t>(RankState::kLeft), std::memory_order_release);
    futex_wake_all(&memory_->line(topology_.local).word);
  }
  if (exchange_ != nullptr)
    exchange_->farewell(encode_farewell(topology_.rank, options_.generation, nullptr));
}

void HierarchicalGroup::join_node(int node_memory) {
  if (node_memory < 0)
    throw Error(Code::kInvalidArgument,
                fmt::format("group: {} shares its node with {} other ranks but was given no shared "
                            "memory. Fix: pass the descriptor of create_node_memory()",
                            topology_.names[topology_.rank], topology_.own_node().size() - 1));
  auto memory =
      std::make_unique<NodeMemory>(node_memory, static_cast<int>(topology_.own_node().size()));
  RankInfo& info = memory->info(topology_.local);
  if (info.state.load(std::memory_order_acquire) != static_cast<uint32_t>(RankState::kAbsent))
    throw Error(Code::kAlreadyExists,
                fmt::format("shared memory of the node: place {} is taken by rank {} of process {} "
                            "in generation {:#x}. Fix: make new shared memory for every generation",
                            topology_.local, info.rank, info.pid, info.generation));
  info.rank = topology_.rank;
  info.pid = ::getpid();
  info.generation = options_.generation;
  info.state.store(static_cast<uint32_t>(RankState::kJoined), std::memory_order_release);
  futex_wake_all(&info.state);
  memory_ = std::move(memory);
}

void HierarchicalGroup::await_siblings(Deadline deadline) {
  const auto& own = topology_.own_node();
  auto next_report = Clock::now() + kReportEvery;
  for (size_t local = 0; local < own.size(); ++local) {
    RankInfo& info = memory_->info(static_cast<int>(local));
    while (info.state.load(std::memory_order_acquire) ==
           static_cast<uint32_t>(RankState::kAbsent)) {
      check(own[local]);
      if (deadline.passed())
        throw FaultError(
            {Code::kDeadlineExceeded, own[local],
             fmt::format("group was not formed within {} s. {} still misses {} of its own node: it "
                         "has not joined the shared memory",
                         options_.connect_seconds, topology_.names[topology_.rank],
                         topology_.names[own[local]])});
      if (Clock::now() >= next_report) {
        log_info("{} waits for {}", topology_.names[topology_.rank], topology_.names[own[local]]);
        next_report = Clock::now() + kReportEvery;
      }
      futex_wait(&info.state, static_cast<uint32_t>(RankState::kAbsent), deadline.poll_ms(kSliceMs));
    }
    if (info.rank != own[local] || info.generation != options_.generation)
      throw FaultError(
          {Code::kFailedPrecondition, own[local],
           fmt::format("shared memory of the node: place {} holds rank {} of generation {:#x}, "
                       "expected {} of generation {:#x}. Fix: make new shared memory for every "
                       "generation",
                       local, info.rank, info.generation, topology_.names[own[local]],
                       options_.generation)});
    if (info.pid == ::getpid()) continue;
    UniqueFd process(static_cast<int>(::syscall(SYS_pidfd_open, info.pid, 0)));
    if (!process.valid() && errno == ESRCH)
      throw FaultError({Code::kUnavailable, own[local],
                        fmt::format("{} lost: its process {} ended while the group was forming",
                                    topology_.names[own[local]], info.pid)});
    if (process.valid())
      siblings_.push_back({own[local], static_cast<int>(local), std::move(process)});
  }
}

void HierarchicalGroup::self_test() {
  const int count = size();
  const std::vector<int64_t> row_bytes(count, sizeof(uint32_t));
  std::vector<uint32_t> table(static_cast<size_t>(count) * 2);
  const auto known = [&](int row, int of) { return static_cast<uint32_t>(row * 65536 + of + 1); };
  for (int row = 0; row < 2; ++row) table[row * count + rank()] = known(row, rank());
  all_gather(reinterpret_cast<std::byte*>(table.data()), 2, row_bytes);
  std::vector<float> sums(count + 3, static_cast<float>(rank() + 1));
  all_reduce(sums);
  for (int row = 0; row < 2; ++row)
    for (int other = 0; other < count; ++other)
      if (table[row * count + other] != known(row, other))
        throw FaultError({Code::kDataLoss, other,
                          fmt::format("self-test of the group: found {:#x} from {}, expected {:#x}",
                                      table[row * count + other], topology_.names[other],
                                      known(row, other))});
  const auto total = static_cast<float>(int64_t{count} * (count + 1) / 2);
  for (const float sum : sums)
    if (sum != total && count < 4096)
      throw FaultError({Code::kDataLoss, -1,
                        fmt::format("self-test of the group: sum over ranks is {}, expected {}",
                                    sum, total)});
}

template <typename Body>
void HierarchicalGroup::run(Operation operation, Body body) {
  operation_ = operation;
  ++sequence_;
  const int64_t start = now_ns();
  deadline_ns_ = start + static_cast<int64_t>(std::min(cap_seconds_, 1e8) * 1e9);
  try {
    if (aborted()) check(-1);
    exchange_->begin(operation, sequence_);
    if (slots_ != nullptr) slots_->begin(operation, sequence_);
    body();
  } catch (const FaultError& error) {
    end(error.fault());
    throw;
  } catch (const std::exception& error) {
    end({Code::kInternal, topology_.rank,
         fmt::format("{} failed: {}", topology_.names[topology_.rank], error.what())});
    throw;
  }
  busy_ns_ += static_cast<uint64_t>(now_ns() - start);
}

void HierarchicalGroup::all_gather(std::byte* matrix, int64_t rows,
                                   std::span<const int64_t> row_bytes) {
  PHALANX_CHECK(static_cast<int>(row_bytes.size()) == size() && rows >= 0);
  run(Operation::kAllGather, [&] {
    int64_t stride = 0;
    for (const int64_t bytes : row_bytes) stride += bytes;
    blocks_.clear();
    int64_t at = 0;
    for (const int64_t bytes : row_bytes) {
      blocks_.push_back(Region::columns(matrix + at, rows, bytes, stride));
      at += bytes;
    }
    gather_blocks(blocks_);
  });
}

void HierarchicalGroup::gather_blocks(std::span<const Region> blocks) {
  const Topology& t = topology_;
  const int node_count = static_cast<int>(t.nodes.size());
  if (node_count > 1 && even_) {
    // Own local index of every node: one block per node.
    int64_t largest = 0;
    std::vector<Region>& column = streams_[0];
    column.clear();
    for (const int rank : column_) {
      column.push_back(blocks[rank]);
      largest = std::max(largest, blocks[rank].bytes());
    }
    // All ranks must choose alike, also those of other columns, which see other blocks: they never
    // meet in a message, so each column may choose for itself.
    if (node_count >= kRingNodes && largest >= kRingBytes) {
      all_gather_ring(*exchange_, column_, t.node, column);
    } else {
      all_gather_one_hop(*exchange_, column_, t.node, column);
    }
  } else if (node_count > 1) {
    for (int node = 0; node < node_count; ++node)
      if (node != t.node) exchange_->send(t.receiver(node, t.rank), {&blocks[t.rank], 1});
    for (int from = 0; from < t.size(); ++from)
      if (t.node_of[from] != t.node && t.receiver(t.node, from) == t.rank)
        exchange_->recv(from, {&blocks[from], 1});
    exchange_->run();
  }
  if (slots_ == nullptr) return;
  for (size_t local = 0; local < streams_.size(); ++local) {
    const int owner = t.own_node()[local];
    streams_[local].assign(1, blocks[owner]);
    if (node_count == 1) continue;
    for (int from = 0; from < t.size(); ++from)
      if (t.node_of[from] != t.node && t.receiver(t.node, from) == owner)
        streams_[local].push_back(blocks[from]);
  }
  slots_->all_gather(streams_);
}

void HierarchicalGroup::gather(std::byte* matrix, int64_t rows, std::span<const int64_t> row_bytes,
                               int root) {
  PHALANX_CHECK(static_cast<int>(row_bytes.size()) == size() && rows >= 0 && root >= 0 &&
                root < size());
  run(Operation::kGather, [&] {
    const Topology& t = topology_;
    int64_t stride = 0;
    for (const int64_t bytes : row_bytes) stride += bytes;
    blocks_.clear();
    int64_t at = 0;
    for (int other = 0; other < size(); ++other) {
      const int64_t bytes = row_bytes[other];
      if (t.rank == root) {
        blocks_.push_back(Region::columns(matrix + at, rows, bytes, stride));
      } else {
        blocks_.push_back(Region::plain(other == t.rank ? matrix : nullptr, rows * bytes));
      }
      at += bytes;
    }
    if (t.rank == root) {
      for (int other = 0; other < size(); ++other)
        if (t.node_of[other] != t.node) exchange_->recv(other, {&blocks_[other], 1});
      exchange_->run();
    } else if (t.node_of[root] != t.node) {
      exchange_->send(root, {&blocks_[t.rank], 1});
      exchange_->run();
      return;
    }
    if (slots_ == nullptr) return;
    for (size_t local = 0; local < streams_.size(); ++local)
      streams_[local].assign(1, blocks_[t.own_node()[local]]);
    slots_->gather(streams_, t.local_of[root]);
  });
}

void HierarchicalGroup::broadcast(std::span<std::byte> bytes, int root) {
  PHALANX_CHECK(root >= 0 && root < size());
  run(Operation::kBroadcast, [&] {
    const Topology& t = topology_;
    const int node_count = static_cast<int>(t.nodes.size());
    // One rank of every node, root first.
    std::vector<int> leaders{root};
    int position = root == t.rank ? 0 : -1;
    int own_leader = root;
    for (int step = 1; step < node_count; ++step) {
      const int node = (t.node_of[root] + step) % node_count;
      leaders.push_back(t.receiver(node, root));
      if (node == t.node) own_leader = leaders.back();
      if (leaders.back() == t.rank) position = step;
    }
    if (bytes.empty()) return;
    if (node_count > 1 && position >= 0)
      comm::broadcast(*exchange_, leaders, position, bytes);
    if (slots_ != nullptr) slots_->broadcast(bytes, t.local_of[own_leader]);
  });
}

std::byte* HierarchicalGroup::scratch(int64_t bytes) {
  if (static_cast<int64_t>(scratch_.size()) < bytes) scratch_.resize(bytes);
  return scratch_.data();
}

void HierarchicalGroup::all_reduce(std::span<float> values) {
  run(Operation::kAllReduce, [&] {
    const Topology& t = topology_;
    const auto bytes = static_cast<int64_t>(values.size_bytes());
    if (bytes == 0) return;
    if (t.nodes.size() == 1) return slots_->all_reduce(values);
    if (bytes * size() > kOneShotBytes) return reduce_by_owners(values);
    std::byte* const copies = scratch(bytes * size());
    std::vector<const float*> sources(size());
    blocks_.clear();
    for (int other = 0; other < size(); ++other) {
      std::byte* const copy = other == t.rank ? reinterpret_cast<std::byte*>(values.data())
                                              : copies + other * bytes;
      blocks_.push_back(Region::plain(copy, bytes));
      sources[other] = reinterpret_cast<const float*>(copy);
    }
    gather_blocks(blocks_);
    sum_in_order(values.data(), sources, static_cast<int64_t>(values.size()));
  });
}

// Each rank adds its share of the vector, in rank order, then all gather the shares.
void HierarchicalGroup::reduce_by_owners(std::span<float> values) {
  const Topology& t = topology_;
  const auto count = static_cast<int64_t>(values.size());
  const auto first = [&](int of) { return count * of / size(); };
  const auto share = [&](int of) {
    return Region::plain(reinterpret_cast<std::byte*>(values.data() + first(of)),
                         (first(of + 1) - first(of)) * int64_t{sizeof(float)});
  };
  const int64_t begin = first(t.rank);
  const int64_t end = first(t.rank + 1);
  const int64_t own_bytes = (end - begin) * int64_t{sizeof(float)};
  std::byte* const copies = scratch(own_bytes * size());
  std::vector<const float*> sources(size());
  for (int other = 0; other < size(); ++other) {
    if (t.node_of[other] == t.node) continue;
    const Region out = share(other);
    const Region in = Region::plain(copies + other * own_bytes, own_bytes);
    sources[other] = reinterpret_cast<const float*>(in.data);
    exchange_->send(other, {&out, 1});
    exchange_->recv(other, {&in, 1});
  }
  exchange_->run();

  std::vector<const float*> at(size());
  const auto add = [&](int64_t offset, int64_t length, std::span<const float* const> local) {
    const int64_t low = std::max(offset, begin);
    const int64_t high = std::min(offset + length, end);
    if (low >= high) return;
    for (int other = 0; other < size(); ++other)
      at[other] = t.node_of[other] == t.node ? local[t.local_of[other]] + (low - offset)
                                             : sources[other] + (low - begin);
    sum_in_order(values.data() + low, at, high - low);
  };
  if (slots_ != nullptr) {
    slots_->publish_pieces(values, add);
  } else {
    const float* const own = values.data();
    add(0, count, {&own, 1});
  }

  blocks_.clear();
  for (int other = 0; other < size(); ++other) blocks_.push_back(share(other));
  gather_blocks(blocks_);
}

void HierarchicalGroup::barrier() {
  run(Operation::kBarrier, [&] {
    const Topology& t = topology_;
    if (slots_ != nullptr) slots_->meet();
    if (t.nodes.size() == 1) return;
    if (t.local == 0) {
      std::vector<int> leaders;
      for (const auto& ranks : t.nodes) leaders.push_back(ranks[0]);
      comm::barrier(*exchange_, leaders, t.node);
    }
    if (slots_ != nullptr) slots_->meet();
  });
}

bool HierarchicalGroup::aborted() const {
  return dead_.load(std::memory_order_acquire) || (memory_ != nullptr && memory_->aborted());
}

bool HierarchicalGroup::ended(const Sibling& sibling) const {
  pollfd entry{sibling.process.get(), POLLIN, 0};
  return ::poll(&entry, 1, 0) > 0 &&
         memory_->info(sibling.local).state.load(std::memory_order_acquire) !=
             static_cast<uint32_t>(RankState::kLeft);
}

void HierarchicalGroup::check(int awaited) {
  if (dead_.load(std::memory_order_acquire)) {
    const std::lock_guard lock(mutex_);
    throw FaultError(*fault_);
  }
  if (options_.abandoned) {  // only while the group forms
    if (const std::string why = options_.abandoned(); !why.empty())
      throw FaultError({Code::kAborted, topology_.rank, why});
  }
  if (memory_ != nullptr) {
    const auto victim = std::find_if(siblings_.begin(), siblings_.end(),
                                     [&](const Sibling& one) { return ended(one); });
    // A sibling that failed says so before its process ends.
    if (const auto fault = memory_->fault()) throw FaultError(*fault);
    if (victim != siblings_.end())
      throw FaultError({Code::kUnavailable, victim->rank,
                        fmt::format("{} lost: its process {} ended (noticed by {} in {} #{})",
                                    topology_.names[victim->rank], memory_->info(victim->local).pid,
                                    topology_.names[topology_.rank], operation_name(operation_),
                                    sequence_)});
  }
  if (exchange_ != nullptr && awaited >= 0 && topology_.node_of[awaited] == topology_.node)
    exchange_->look_at_peers();
  if (now_ns() > deadline_ns_)
    throw FaultError({Code::kDeadlineExceeded, awaited,
                      fmt::format("{} did not arrive in {} #{} within {} s (noticed by {})",
                                  awaited >= 0 ? topology_.names[awaited] : "a peer",
                                  operation_name(operation_), sequence_, cap_seconds_,
                                  topology_.names[topology_.rank])});
}

void HierarchicalGroup::explain_loss() {
  check(-1);
  if (memory_ == nullptr) return;
  for (const int rank : topology_.own_node())
    if (memory_->info(topology_.local_of[rank]).state.load(std::memory_order_acquire) ==
        static_cast<uint32_t>(RankState::kLeft))
      throw FaultError({Code::kUnavailable, rank,
                        fmt::format("{} lost: it left the group (noticed by {} in {} #{})",
                                    topology_.names[rank], topology_.names[topology_.rank],
                                    operation_name(operation_), sequence_)});
}

void HierarchicalGroup::end(const Fault& fault) noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (!fault_) fault_ = fault;
  }
  dead_.store(true, std::memory_order_release);
  if (memory_ != nullptr) memory_->abort(fault);
  if (exchange_ != nullptr)
    exchange_->farewell(encode_farewell(topology_.rank, options_.generation, &fault));
}

void HierarchicalGroup::abort(const char* reason) noexcept {
  end({Code::kAborted, topology_.rank,
       fmt::format("{} aborted the group: {}", topology_.names[topology_.rank], reason)});
}

uint64_t HierarchicalGroup::waited_ns() const {
  return exchange_->stats().wait_ns + (slots_ != nullptr ? slots_->stats().wait_ns : 0);
}

GroupStats HierarchicalGroup::stats() const {
  GroupStats stats;
  stats.operations = sequence_;
  stats.bytes_sent = exchange_->stats().bytes_sent;
  stats.bytes_received = exchange_->stats().bytes_received;
  stats.bytes_shared = slots_ != nullptr ? slots_->stats().bytes_shared : 0;
  stats.wait_ns = std::min(waited_ns(), busy_ns_);
  stats.transfer_ns = busy_ns_ - stats.wait_ns;
  return stats;
}

}  // namespace phalanx::comm
