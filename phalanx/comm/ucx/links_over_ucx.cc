#include <fmt/format.h>
#include <poll.h>

#include <cstring>
#include <iterator>
#include <utility>

#include "phalanx/base/error.h"
#include "phalanx/comm/ucx/ucx.h"
#include "phalanx/comm/ucx/ucx_link.h"

namespace phalanx::comm {

namespace {

constexpr int kSliceMs = 50;

struct AddressHeader {
  uint32_t magic = 0x41584850;  // "PHXA"
  uint32_t size = 0;            // bytes that follow
  std::array<uint32_t, 3> version{};  // of UCX
  uint32_t reserved = 0;

  bool operator==(const AddressHeader&) const = default;
};
static_assert(sizeof(AddressHeader) == 24);

struct Talk {
  size_t sent = 0;
  size_t received = 0;
  AddressHeader header;
  std::vector<std::byte> address;

  [[nodiscard]] bool heard() const {
    return received >= sizeof header && received == sizeof header + address.size();
  }
};

class Introduction {
 public:
  Introduction(const GroupOptions& options, const Topology& topology,
               std::vector<std::unique_ptr<Link>>& channels, const UcxWorker& worker)
      : options_(options), topology_(topology), channels_(channels), talks_(channels.size()) {
    const std::vector<std::byte> address = worker.address();
    own_.size = static_cast<uint32_t>(address.size());
    own_.version = worker.version();
    message_.resize(sizeof own_);
    std::memcpy(message_.data(), &own_, sizeof own_);
    message_.insert(message_.end(), address.begin(), address.end());
  }

  // The addresses by rank.
  std::vector<Talk> run(Deadline deadline, Watch* watch) {
    for (;;) {
      watch->check(-1);
      std::vector<pollfd> polled;
      int missing = -1;
      for (size_t peer = 0; peer < talks_.size(); ++peer) {
        if (channels_[peer] == nullptr) continue;
        const int rank = static_cast<int>(peer);
        send(rank);
        while (!talks_[peer].heard() && hear(rank)) {
        }
        const bool sending = talks_[peer].sent < message_.size();
        if (talks_[peer].heard() && !sending) continue;
        missing = rank;
        polled.push_back({channels_[peer]->fd(),
                          channels_[peer]->events(!talks_[peer].heard(), sending), 0});
      }
      if (missing < 0) return std::move(talks_);
      if (deadline.passed())
        throw FaultError({Code::kDeadlineExceeded, missing,
                          fmt::format("group was not formed within {} s. {} still misses the UCX "
                                      "address of {}",
                                      options_.connect_seconds, topology_.names[topology_.rank],
                                      topology_.names[missing])});
      (void)::poll(polled.data(), polled.size(), deadline.poll_ms(kSliceMs));
    }
  }

 private:
  void send(int peer) {
    Talk& talk = talks_[peer];
    if (talk.sent == message_.size()) return;
    const iovec run{message_.data() + talk.sent, message_.size() - talk.sent};
    const int64_t count = channels_[peer]->send_some({&run, 1});
    if (count < 0) lost(peer);
    talk.sent += static_cast<size_t>(count);
  }

  bool hear(int peer) {  // true if bytes came
    Talk& talk = talks_[peer];
    const bool in_header = talk.received < sizeof talk.header;
    std::byte* const to = in_header ? reinterpret_cast<std::byte*>(&talk.header) + talk.received
                                    : talk.address.data() + (talk.received - sizeof talk.header);
    const size_t left = in_header ? sizeof talk.header - talk.received
                                  : sizeof talk.header + talk.address.size() - talk.received;
    const iovec run{to, left};
    const int64_t count = channels_[peer]->recv_some({&run, 1});
    if (count < 0) lost(peer);
    talk.received += static_cast<size_t>(count);
    if (count > 0 && in_header && talk.received == sizeof talk.header) check(peer, talk);
    return count > 0;
  }

  void check(int peer, Talk& talk) {
    AddressHeader same = own_;
    same.size = talk.header.size;
    if (talk.header.magic != own_.magic || talk.header.size == 0 ||
        talk.header.size > UcxWorker::kMaxAddressBytes || talk.header.reserved != 0)
      throw FaultError({Code::kFailedPrecondition, peer,
                        fmt::format("{} sent no UCX address: found magic {:#x} and {} bytes, "
                                    "expected {:#x} and 1 to {}. Fix: the same PHALANX_DATA_PLANE "
                                    "on all nodes",
                                    topology_.names[peer], talk.header.magic, talk.header.size,
                                    own_.magic, UcxWorker::kMaxAddressBytes)});
    if (talk.header != same)
      throw FaultError({Code::kFailedPrecondition, peer,
                        fmt::format("{} has UCX {}, {} has {}. Fix: install the same version "
                                    "of UCX on all nodes",
                                    topology_.names[peer], ucx_version_text(talk.header.version),
                                    topology_.names[topology_.rank],
                                    ucx_version_text(own_.version))});
    talk.address.resize(talk.header.size);
  }

  [[noreturn]] void lost(int peer) {
    Farewell farewell;
    const std::string why = channels_[peer]->why();
    (void)channels_[peer]->look(&farewell);
    if (!farewell.fault.text.empty()) throw FaultError(farewell.fault);
    throw FaultError({Code::kUnavailable, peer,
                      fmt::format("{} was lost while the group was forming: {}",
                                  topology_.names[peer], why)});
  }

  const GroupOptions& options_;
  const Topology& topology_;
  std::vector<std::unique_ptr<Link>>& channels_;
  std::vector<Talk> talks_;
  AddressHeader own_;
  std::vector<std::byte> message_;
};

// Connects the links, so that what does not work is told now and by name: the higher rank of a pair
// sends a greeting over UCX and says over the channel that it is gone; the lower takes it and says so.
class Connecting {
 public:
  Connecting(const GroupOptions& options, const Topology& topology, const std::vector<Talk>& talks,
             std::vector<std::unique_ptr<UcxLink>>& links, UcxWorker& worker)
      : options_(options), topology_(topology), talks_(talks), links_(links), worker_(worker),
        stages_(links.size(), Stage::kDone) {
    for (size_t peer = 0; peer < links.size(); ++peer)
      if (links[peer] != nullptr)
        stages_[peer] = static_cast<int>(peer) < options.rank ? Stage::kGreeting : Stage::kListening;
  }

  void run(Deadline deadline, Watch* watch) {
    for (size_t peer = 0; peer < links_.size(); ++peer)
      if (stages_[peer] == Stage::kGreeting) connect(static_cast<int>(peer));
    for (;;) {
      watch->check(-1);
      worker_.progress();
      int missing = -1;
      for (size_t peer = 0; peer < links_.size(); ++peer) {
        while (stages_[peer] != Stage::kDone && step(static_cast<int>(peer))) {
        }
        if (stages_[peer] != Stage::kDone) missing = static_cast<int>(peer);
      }
      if (missing < 0) return;
      if (deadline.passed())
        throw FaultError({Code::kDeadlineExceeded, missing,
                          fmt::format("group was not formed within {} s. {} still misses the UCX "
                                      "connection with {} (it was told {})",
                                      options_.connect_seconds, topology_.names[topology_.rank],
                                      topology_.names[missing], worker_.settings())});
      sleep(deadline);
    }
  }

 private:
  enum class Stage {
    kGreeting,   // higher: the greeting is on its way
    kAwaiting,   // higher: until the lower one has it
    kListening,  // lower: until the higher one says that it has greeted
    kTaking,     // lower: until the greeting is here
    kDone,
  };
  static constexpr uint64_t kGreeting = 0x31584355584E4C50;  // "PLNXUCX1"

  void connect(int peer) {
    const std::string problem = links_[peer]->connect(talks_[peer].address);
    if (!problem.empty())
      throw FaultError({Code::kUnavailable, peer,
                        fmt::format("{} cannot reach {} over UCX: {}. It was told {}. Fix: name "
                                    "devices and transports that both have",
                                    topology_.names[topology_.rank], topology_.names[peer], problem,
                                    worker_.settings())});
  }

  bool step(int peer) {  // true if it moved on
    UcxLink& link = *links_[peer];
    switch (stages_[peer]) {
      case Stage::kGreeting:
        if (!moved(peer, link, Way::kSend)) return false;
        say(peer);
        stages_[peer] = Stage::kAwaiting;
        return true;
      case Stage::kAwaiting:
        if (!moved(peer, link.channel(), Way::kReceive)) return false;
        stages_[peer] = Stage::kDone;
        return true;
      case Stage::kListening:
        if (!moved(peer, link.channel(), Way::kReceive)) return false;
        connect(peer);
        stages_[peer] = Stage::kTaking;
        return true;
      case Stage::kTaking:
        if (!moved(peer, link, Way::kReceive)) return false;
        say(peer);
        stages_[peer] = Stage::kDone;
        return true;
      case Stage::kDone: break;
    }
    return false;
  }

  enum class Way { kSend, kReceive };
  // The word goes or comes as a whole: it is short, and alone on its way.
  bool moved(int peer, Link& link, Way way) {
    uint64_t word = kGreeting;
    const iovec run{&word, sizeof word};
    const int64_t count =
        way == Way::kSend ? link.send_some({&run, 1}) : link.recv_some({&run, 1});
    if (count == 0) return false;
    if (count == sizeof word && word == kGreeting) return true;
    Farewell farewell;
    const std::string why = link.why();
    (void)links_[peer]->look(&farewell);
    if (!farewell.fault.text.empty()) throw FaultError(farewell.fault);
    throw FaultError({Code::kUnavailable, peer,
                      fmt::format("{} was lost while the group was forming: {}",
                                  topology_.names[peer], count < 0 ? why : "no greeting came")});
  }
  void say(int peer) {
    if (!moved(peer, links_[peer]->channel(), Way::kSend))
      throw FaultError({Code::kInternal, peer, "a new connection took no 8 bytes"});
  }

  void sleep(Deadline deadline) {
    if (!worker_.arm()) return;
    std::vector<pollfd> polled{{worker_.wake_fd(), POLLIN, 0}};
    for (size_t peer = 0; peer < links_.size(); ++peer)
      if (stages_[peer] != Stage::kDone)
        polled.push_back({links_[peer]->fd(), links_[peer]->channel().events(true, false), 0});
    (void)::poll(polled.data(), polled.size(), deadline.poll_ms(kSliceMs));
  }

  const GroupOptions& options_;
  const Topology& topology_;
  const std::vector<Talk>& talks_;
  std::vector<std::unique_ptr<UcxLink>>& links_;
  UcxWorker& worker_;
  std::vector<Stage> stages_;
};

}  // namespace

std::vector<std::unique_ptr<Link>> links_over_ucx(const GroupOptions& options,
                                                  const Topology& topology,
                                                  std::vector<std::unique_ptr<Link>> channels,
                                                  Deadline deadline, Watch* watch) {
  std::vector<std::unique_ptr<UcxLink>> links(channels.size());
  const auto farewell = [&](const Fault& fault) {
    const FarewellFrame frame = encode_farewell(options.rank, options.generation, &fault);
    for (const auto& link : links)
      if (link != nullptr) link->farewell(frame);
    for (const auto& channel : channels)
      if (channel != nullptr) channel->farewell(frame);
  };
  try {
    const auto worker = UcxWorker::open(options.members[options.rank].data_address);
    const std::vector<Talk> talks =
        Introduction(options, topology, channels, *worker).run(deadline, watch);
    for (size_t peer = 0; peer < channels.size(); ++peer)
      if (channels[peer] != nullptr)
        links[peer] = worker->link(std::move(channels[peer]));
    Connecting(options, topology, talks, links, *worker).run(deadline, watch);
  } catch (const FaultError& error) {
    farewell(error.fault());
    throw;
  } catch (const Error& error) {
    const Fault fault{error.code(), topology.rank,
                      fmt::format("{}: {}", topology.names[topology.rank], error.what())};
    farewell(fault);
    throw FaultError(fault);
  }
  return {std::make_move_iterator(links.begin()), std::make_move_iterator(links.end())};
}

}  // namespace phalanx::comm
