#include "phalanx/comm/exchange.h"

#include <fmt/format.h>
#include <poll.h>

#include <array>
#include <cstring>

#include "phalanx/base/check.h"
#include "phalanx/base/clock.h"
#include "phalanx/comm/tcp/silence.h"

namespace phalanx::comm {

namespace {
constexpr int kMaxRuns = 512;      // runs of a strided message handed to one system call
constexpr int kSliceMs = 50;       // longest sleep without looking around
constexpr int kEvidenceMs = 30;    // for the reason of a loss to arrive
constexpr int64_t kListenEveryNs = 250'000'000;  // for peers that a cut network hides
}  // namespace

Exchange::Exchange(std::vector<std::unique_ptr<Link>> links, std::vector<std::string> names,
                   int rank, uint64_t generation, int spin_us, Watch* watch)
    : links_(std::move(links)),
      names_(std::move(names)),
      rank_(rank),
      generation_(generation),
      spin_ns_(int64_t{spin_us} * 1000),
      watch_(watch),
      outgoing_(links_.size()),
      incoming_(links_.size()),
      ignored_(links_.size()) {
  for (const auto& link : links_) has_links_ = has_links_ || link != nullptr;
}

void Exchange::begin(Operation operation, uint64_t sequence) {
  operation_ = operation;
  sequence_ = sequence;
}

void Exchange::start(Message* message, std::vector<int>* list, int peer,
                     std::span<const Region> regions, int sender) {
  PHALANX_CHECK(!message->active && links_[peer] != nullptr);
  message->active = true;
  message->header.operation = operation_;
  message->header.sender = static_cast<uint16_t>(sender);
  message->header.generation = generation_;
  message->header.sequence = sequence_;
  message->header_done = 0;
  message->regions.assign(regions.begin(), regions.end());
  message->cursor = RegionCursor(message->regions);
  message->header.length = static_cast<uint64_t>(message->cursor.left());
  list->push_back(peer);
}

void Exchange::send(int peer, std::span<const Region> regions) {
  if (total_bytes(regions) > 0) start(&outgoing_[peer], &sending_, peer, regions, rank_);
}

void Exchange::recv(int peer, std::span<const Region> regions) {
  if (total_bytes(regions) > 0) start(&incoming_[peer], &receiving_, peer, regions, peer);
}

void Exchange::send_signal(int peer) { start(&outgoing_[peer], &sending_, peer, {}, rank_); }
void Exchange::recv_signal(int peer) { start(&incoming_[peer], &receiving_, peer, {}, peer); }

bool Exchange::push(int peer) {
  Message& message = outgoing_[peer];
  Link& link = *links_[peer];
  std::array<iovec, kMaxRuns + 1> runs;
  int count = 0;
  const int64_t header_left = int64_t{sizeof(FrameHeader)} - message.header_done;
  if (header_left > 0) {
    if (message.header_done == 0 && !link.begin_frame()) lost(peer);
    runs[count++] = {reinterpret_cast<std::byte*>(&message.header) + message.header_done,
                     static_cast<size_t>(header_left)};
  }
  count += message.cursor.peek(runs.data() + count, kMaxRuns);
  const int64_t moved = link.send_some({runs.data(), static_cast<size_t>(count)});
  if (moved < 0) lost(peer);
  if (moved == 0) {
    if (message.header_done == 0) link.end_frame();
    return false;
  }
  const int64_t of_header = std::min(moved, header_left);
  message.header_done += of_header;
  message.cursor.advance(moved - of_header);
  stats_.bytes_sent += static_cast<uint64_t>(moved - of_header);
  if (message.header_done == sizeof(FrameHeader) && message.cursor.left() == 0) {
    link.end_frame();
    message.active = false;
  }
  return true;
}

bool Exchange::pull(int peer) {
  Message& message = incoming_[peer];
  Link& link = *links_[peer];
  std::array<iovec, kMaxRuns + 1> runs;
  int count = 0;
  const int64_t header_left = int64_t{sizeof(FrameHeader)} - message.header_done;
  if (header_left > 0)
    runs[count++] = {reinterpret_cast<std::byte*>(&message.received) + message.header_done,
                     static_cast<size_t>(header_left)};
  count += message.cursor.peek(runs.data() + count, kMaxRuns);
  const int64_t moved = link.recv_some({runs.data(), static_cast<size_t>(count)});
  if (moved < 0) lost(peer);
  if (moved == 0) return false;
  const int64_t of_header = std::min(moved, header_left);
  message.header_done += of_header;
  message.cursor.advance(moved - of_header);
  stats_.bytes_received += static_cast<uint64_t>(moved - of_header);
  if (header_left > 0 && message.header_done == sizeof(FrameHeader)) check_header(peer, message);
  if (message.header_done == sizeof(FrameHeader) && message.cursor.left() == 0)
    message.active = false;
  return true;
}

void Exchange::check_header(int peer, Message& message) {
  const FrameHeader& got = message.received;
  if (got == message.header) return;
  if (got.magic == FrameHeader{}.magic && got.operation == Operation::kFarewell) {
    // Part of its body may lie where the payload was to go; the rest is still to be read.
    std::array<std::byte, kFarewellBytes> frame;
    std::memcpy(frame.data(), &got, sizeof got);
    RegionCursor landed(message.regions);
    int64_t have = std::min(landed.left() - message.cursor.left(),
                            int64_t{kFarewellBytes} - int64_t{sizeof got});
    landed.copy_to(frame.data() + sizeof got, have);
    have += sizeof got;
    const Deadline deadline = Deadline::in(std::chrono::milliseconds(kSliceMs));
    while (have < static_cast<int64_t>(kFarewellBytes) && !deadline.passed()) {
      const iovec rest{frame.data() + have, kFarewellBytes - have};
      const int64_t moved = links_[peer]->recv_some({&rest, 1});
      if (moved < 0) break;
      if (moved == 0) ::poll(nullptr, 0, 1);
      have += moved;
    }
    if (have == static_cast<int64_t>(kFarewellBytes))
      if (const auto farewell = decode_farewell(frame, generation_))
        lost_after(peer, *farewell, farewell->clean ? "it left the group" : "");
    lost_after(peer, Farewell{}, "the connection ended in the middle of its farewell");
  }
  FrameHeader same_call = message.header;
  same_call.operation = got.operation;
  same_call.sequence = got.sequence;
  same_call.length = got.length;
  if (got != same_call)
    throw FaultError({Code::kDataLoss, peer,
                      fmt::format("{} sent bytes that are no frame of this group: found magic {:#x} "
                                  "version {} rank {} generation {:#x}, expected {:#x}, {}, {}, {:#x}",
                                  names_[peer], got.magic, got.version, got.sender, got.generation,
                                  same_call.magic, same_call.version, peer, generation_)});
  throw FaultError({Code::kInternal, peer,
                    fmt::format("{} called {} #{} and sent {} bytes while {} called {} #{} and "
                                "expects {}. All ranks must call the same collectives in the same "
                                "order",
                                names_[peer], operation_name(got.operation), got.sequence,
                                got.length, names_[rank_], operation_name(operation_), sequence_,
                                message.header.length)});
}

void Exchange::run() {
  for (const int peer : sending_) push(peer);
  int64_t idle_since = 0;
  for (;;) {
    bool moved = false;
    for (size_t i = 0; i < sending_.size();) {
      const int peer = sending_[i];
      if (outgoing_[peer].active) moved = push(peer) || moved;
      if (outgoing_[peer].active) {
        ++i;
      } else {
        sending_[i] = sending_.back();
        sending_.pop_back();
      }
    }
    for (size_t i = 0; i < receiving_.size();) {
      const int peer = receiving_[i];
      moved = pull(peer) || moved;
      if (incoming_[peer].active) {
        ++i;
      } else {
        receiving_[i] = receiving_.back();
        receiving_.pop_back();
      }
    }
    if (sending_.empty() && receiving_.empty()) {
      if (idle_since != 0) stats_.wait_ns += static_cast<uint64_t>(now_ns() - idle_since);
      return;
    }
    if (moved) {
      if (idle_since != 0) {
        stats_.wait_ns += static_cast<uint64_t>(now_ns() - idle_since);
        idle_since = 0;
      }
      continue;
    }
    if (watch_->aborted()) watch_->check(-1);
    const int64_t now = now_ns();
    if (idle_since == 0) idle_since = now;
    if (now - idle_since > spin_ns_) sleep();
  }
}

void Exchange::sleep() {
  watch_->check(receiving_.empty() ? sending_[0] : receiving_[0]);
  polled_.clear();
  polled_ranks_.clear();
  for (size_t peer = 0; peer < links_.size(); ++peer) {
    if (links_[peer] == nullptr) continue;
    const bool receiving = incoming_[peer].active;
    const bool sending = outgoing_[peer].active;
    if (ignored_[peer] && !receiving && !sending) continue;
    if (!links_[peer]->prepare_sleep()) return;
    polled_.push_back({links_[peer]->fd(), links_[peer]->events(receiving, sending), 0});
    polled_ranks_.push_back(static_cast<int>(peer));
  }
  for (const int peer : polled_ranks_)
    if (const int wake = links_[peer]->wake_fd(); wake >= 0) polled_.push_back({wake, POLLIN, 0});
  if (::poll(polled_.data(), polled_.size(), kSliceMs) <= 0) {
    look_for_silence();
    return;
  }
  for (size_t i = 0; i < polled_ranks_.size(); ++i) {
    const int peer = polled_ranks_[i];
    if ((polled_[i].revents & (POLLRDHUP | POLLHUP | POLLERR)) == 0) continue;
    // What is still unread of an awaited message comes first; its end is noticed by pull().
    if (incoming_[peer].active) continue;
    Farewell farewell;
    switch (links_[peer]->look(&farewell)) {
      case Link::Peer::kAlive: break;
      case Link::Peer::kUnread:
      case Link::Peer::kLeft:
        if (outgoing_[peer].active) lost_after(peer, farewell, "it left the group");
        ignored_[peer] = true;
        break;
      case Link::Peer::kGone: lost_after(peer, farewell, links_[peer]->why());
    }
  }
}

void Exchange::look_for_silence() {
  const int64_t now = now_ns();
  if (now - listened_ns_ < kListenEveryNs) return;
  listened_ns_ = now;
  for (size_t peer = 0; peer < links_.size(); ++peer) {
    if (links_[peer] == nullptr || ignored_[peer]) continue;
    const std::string silence = silence_of(links_[peer]->fd());
    if (!silence.empty()) lost_after(static_cast<int>(peer), Farewell{}, silence);
  }
}

void Exchange::look_at_peers() {
  look_for_silence();
  for (size_t peer = 0; peer < links_.size(); ++peer) {
    if (links_[peer] == nullptr || ignored_[peer]) continue;
    Farewell farewell;
    switch (links_[peer]->look(&farewell)) {
      case Link::Peer::kAlive: break;
      case Link::Peer::kUnread: break;
      case Link::Peer::kLeft: ignored_[peer] = true; break;
      case Link::Peer::kGone: lost_after(static_cast<int>(peer), farewell, links_[peer]->why());
    }
  }
}

void Exchange::lost(int peer) {
  const std::string why = links_[peer]->why();
  Farewell farewell;
  const Link::Peer state = links_[peer]->look(&farewell);
  lost_after(peer, farewell, state == Link::Peer::kLeft ? "it left the group" : why);
}

void Exchange::lost_after(int peer, const Farewell& farewell, const std::string& why) {
  if (!farewell.fault.text.empty()) throw FaultError(farewell.fault);
  // This peer may have been taken along by another that failed first. Whoever says why is believed;
  // else all that are gone are named.
  std::string gone;
  const Deadline deadline = Deadline::in(std::chrono::milliseconds(kEvidenceMs));
  do {
    watch_->explain_loss();
    gone = names_[peer];
    for (size_t other = 0; other < links_.size(); ++other) {
      if (links_[other] == nullptr || static_cast<int>(other) == peer) continue;
      Farewell said;
      const Link::Peer state = links_[other]->look(&said);
      if (!said.fault.text.empty()) throw FaultError(said.fault);
      if (state == Link::Peer::kGone || state == Link::Peer::kLeft) gone += " and " + names_[other];
    }
    ::poll(nullptr, 0, 2);
  } while (!deadline.passed());
  throw FaultError({Code::kUnavailable, peer,
                    fmt::format("{} lost: {} (noticed by {} in {} #{})", gone, why, names_[rank_],
                                operation_name(operation_), sequence_)});
}

void Exchange::farewell(const FarewellFrame& frame) noexcept {
  for (const auto& link : links_)
    if (link != nullptr) link->farewell(frame);
}

}  // namespace phalanx::comm
