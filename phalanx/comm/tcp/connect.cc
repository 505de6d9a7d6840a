#include "phalanx/comm/tcp/connect.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "phalanx/base/log.h"
#include "phalanx/comm/tcp/address.h"
#include "phalanx/comm/tcp/hello.h"
#include "phalanx/comm/tcp/tcp_link.h"

namespace phalanx::comm {

namespace {

constexpr int kSliceMs = 50;
constexpr size_t kMaxHandshakes = 64;  // connections that have not proved themselves yet
constexpr std::chrono::seconds kHandshake{2};
constexpr std::chrono::milliseconds kFirstRetry{10};
constexpr std::chrono::milliseconds kLastRetry{500};
constexpr std::chrono::seconds kReportEvery{5};
constexpr int kMaxWarnings = 10;

std::string errno_text(int error) {
  return fmt::format("{} (errno {})", std::strerror(error), error);
}

void prepare(int fd) {
  const int on = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

// A connection of this rank to a lower one, until it is a link.
struct Outgoing {
  enum class Stage { kWaiting, kConnecting, kSendingHello, kAwaitingReply, kDone };
  int peer = 0;
  Stage stage = Stage::kWaiting;
  UniqueFd fd;
  Clock::time_point next_try{};
  std::chrono::milliseconds retry = kFirstRetry;
  std::string problem = "not tried yet";
  HelloReply reply;
  size_t received = 0;
};

// A connection somebody made to the listener, until it has proved itself.
struct Incoming {
  UniqueFd fd;
  Clock::time_point until{};
  Hello hello;
  size_t received = 0;
};

class Mesh {
 public:
  Mesh(const GroupOptions& options, const Topology& topology, int listener, Deadline deadline,
       Watch* watch)
      : options_(options),
        topology_(topology),
        listener_(listener),
        deadline_(deadline),
        watch_(watch),
        links_(options.members.size()) {
    expected_.receiver = static_cast<uint32_t>(options.rank);
    expected_.size = static_cast<uint32_t>(topology.size());
    expected_.generation = options.generation;
    expected_.token = options.token;
    for (int peer = 0; peer < topology.size(); ++peer) {
      if (topology.node_of[peer] == topology.node) continue;
      ++missing_;
      if (peer > options.rank) continue;
      outgoing_.emplace_back();
      outgoing_.back().peer = peer;
    }
    if (missing_ > static_cast<int>(outgoing_.size()) && listener < 0)
      throw Error(Code::kInvalidArgument,
                  fmt::format("group: {} needs a listener, because higher ranks of other nodes "
                              "connect to it",
                              topology.names[options.rank]));
    if (listener >= 0) ::fcntl(listener, F_SETFL, ::fcntl(listener, F_GETFL) | O_NONBLOCK);
  }

  std::vector<std::unique_ptr<Link>> run() {
    try {
      return connect_all();
    } catch (const FaultError& error) {
      const FarewellFrame frame =
          encode_farewell(options_.rank, options_.generation, &error.fault());
      for (const auto& link : links_)
        if (link != nullptr) link->farewell(frame);
      throw;
    }
  }

 private:
  std::vector<std::unique_ptr<Link>> connect_all() {
    auto next_report = Clock::now() + kReportEvery;
    while (missing_ > 0) {
      watch_->check(-1);
      if (deadline_.passed())
        throw FaultError({Code::kDeadlineExceeded, first_missing(),
                          fmt::format("group was not formed within {} s. {} still misses {}",
                                      options_.connect_seconds, topology_.names[options_.rank],
                                      describe_missing())});
      if (Clock::now() >= next_report) {
        log_info("{} waits for {}", topology_.names[options_.rank], describe_missing());
        next_report = Clock::now() + kReportEvery;
      }
      step();
    }
    return std::move(links_);
  }

  void step() {
    const auto now = Clock::now();
    auto wake = std::min(deadline_.when(), now + std::chrono::milliseconds(kSliceMs));
    for (Outgoing& out : outgoing_) {
      if (out.stage == Outgoing::Stage::kWaiting && now >= out.next_try) connect(out);
      if (out.stage == Outgoing::Stage::kWaiting) wake = std::min(wake, out.next_try);
    }
    std::erase_if(incoming_, [&](const Incoming& in) {
      if (now < in.until) return false;
      warn("a connection that said nothing in time was closed");
      return true;
    });

    polled_.clear();
    polled_.push_back({listener_, POLLIN, 0});  // a negative descriptor is skipped by poll()
    for (const Outgoing& out : outgoing_) {
      const bool writing = out.stage == Outgoing::Stage::kConnecting ||
                           out.stage == Outgoing::Stage::kSendingHello;
      const bool open = writing || out.stage == Outgoing::Stage::kAwaitingReply;
      polled_.push_back({open ? out.fd.get() : -1, static_cast<short>(writing ? POLLOUT : POLLIN),
                         0});
    }
    const size_t handshakes = incoming_.size();
    for (const Incoming& in : incoming_) polled_.push_back({in.fd.get(), POLLIN, 0});
    for (const auto& link : links_) polled_.push_back({link ? link->fd() : -1, POLLRDHUP, 0});
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(wake - Clock::now()).count();
    if (::poll(polled_.data(), polled_.size(), static_cast<int>(std::max<int64_t>(left, 0))) <= 0)
      return;

    for (size_t i = 0; i < outgoing_.size(); ++i)
      if (polled_[1 + i].revents != 0) advance(outgoing_[i]);
    size_t at = 1 + outgoing_.size();
    for (size_t i = 0; i < handshakes; ++i)
      if (polled_[at + i].revents != 0) hear(incoming_[i]);
    at += handshakes;
    std::erase_if(incoming_, [](const Incoming& in) { return !in.fd.valid(); });
    for (size_t peer = 0; peer < links_.size(); ++peer)
      if (polled_[at + peer].revents != 0 && links_[peer] != nullptr)
        check_link(static_cast<int>(peer));
    if (polled_[0].revents != 0) accept_some();
  }

  void retry_later(Outgoing& out, std::string problem) {
    out.fd.reset();
    out.problem = std::move(problem);
    out.stage = Outgoing::Stage::kWaiting;
    out.next_try = Clock::now() + out.retry;
    out.retry = std::min(out.retry * 2, kLastRetry);
  }

  void connect(Outgoing& out) {
    const Member& peer = options_.members[out.peer];
    SocketAddress target = parse_address(peer.data_address, peer.data_port);
    out.fd.reset(
        ::socket(target.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!out.fd.valid()) return retry_later(out, errno_text(errno));
    prepare(out.fd.get());
    bind_to_own_address(out.fd.get(), target.storage.ss_family);
    if (::connect(out.fd.get(), target.get(), target.size) != 0 && errno != EINPROGRESS)
      return retry_later(out, errno_text(errno));
    out.stage = Outgoing::Stage::kConnecting;
    out.problem = "no answer to the connection yet";
    out.received = 0;
  }

  // So that traffic leaves by the device the rank table names. Best effort: an address that is not
  // on this machine (behind a translation) leaves the choice to the system.
  void bind_to_own_address(int fd, int family) const {
    const Member& self = options_.members[options_.rank];
    if (self.data_address.empty()) return;
    SocketAddress own = parse_address(self.data_address, 0);
    if (own.storage.ss_family != family) return;
    const int on = 1;
    ::setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    (void)!::bind(fd, own.get(), own.size);
  }

  void advance(Outgoing& out) {
    if (out.stage == Outgoing::Stage::kConnecting) {
      int error = 0;
      socklen_t size = sizeof error;
      ::getsockopt(out.fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
      if (error != 0) return retry_later(out, errno_text(error));
      out.stage = Outgoing::Stage::kSendingHello;
    }
    if (out.stage == Outgoing::Stage::kSendingHello) {
      Hello hello = expected_;
      hello.sender = static_cast<uint32_t>(options_.rank);
      hello.receiver = static_cast<uint32_t>(out.peer);
      // 64 bytes always fit an empty socket buffer.
      if (::send(out.fd.get(), &hello, sizeof hello, MSG_NOSIGNAL) != sizeof hello)
        return retry_later(out, errno_text(errno));
      out.stage = Outgoing::Stage::kAwaitingReply;
      out.problem = "connected, but it has not answered (not forming the group yet?)";
      return;
    }
    auto* bytes = reinterpret_cast<std::byte*>(&out.reply);
    const ssize_t count = ::recv(out.fd.get(), bytes + out.received,
                                 sizeof out.reply - out.received, MSG_DONTWAIT);
    if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (count < 0) return retry_later(out, errno_text(errno));
    if (count == 0)
      return retry_later(out, "it closed the connection without an answer (another token or not a "
                              "rank of this group?)");
    out.received += static_cast<size_t>(count);
    if (out.received < sizeof out.reply) return;
    if (out.reply.magic != Hello::kMagic)
      return retry_later(out, "what listens there does not speak this protocol");
    if (out.reply.verdict != Verdict::kWelcome) refuse(out);
    out.stage = Outgoing::Stage::kDone;
    adopt(out.peer, std::move(out.fd));
  }

  [[noreturn]] void refuse(const Outgoing& out) const {
    std::string why;
    switch (out.reply.verdict) {
      case Verdict::kVersion:
        why = fmt::format("it speaks wire version {}, this rank {}. Fix: run the same build "
                          "everywhere",
                          out.reply.version, kWireVersion);
        break;
      case Verdict::kGeneration:
        why = fmt::format("it is in generation {:#x}, this rank in {:#x}", out.reply.generation,
                          options_.generation);
        break;
      default:
        why = fmt::format("it is rank {} of {}, this rank is {} of {} and looks for rank {}",
                          out.reply.rank, out.reply.size, options_.rank, topology_.size(),
                          out.peer);
    }
    throw FaultError({Code::kFailedPrecondition, options_.rank,
                      fmt::format("{} refused {}: {}", where(out.peer),
                                  topology_.names[options_.rank], why)});
  }

  void accept_some() {
    for (size_t i = 0; i < kMaxHandshakes; ++i) {
      UniqueFd fd(::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (!fd.valid()) return;
      prepare(fd.get());
      if (incoming_.size() >= kMaxHandshakes) {
        // A true peer speaks at once, so the oldest silent one is the least likely to be one.
        incoming_.erase(incoming_.begin());
        warn("too many connections that have said nothing; the oldest was closed");
      }
      incoming_.push_back({std::move(fd), Clock::now() + kHandshake, {}, 0});
      hear(incoming_.back());
      if (!incoming_.back().fd.valid()) incoming_.pop_back();
    }
  }

  void hear(Incoming& in) {
    auto* bytes = reinterpret_cast<std::byte*>(&in.hello);
    const ssize_t count =
        ::recv(in.fd.get(), bytes + in.received, sizeof in.hello - in.received, MSG_DONTWAIT);
    if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (count <= 0) return in.fd.reset();
    in.received += static_cast<size_t>(count);
    if (in.received < sizeof in.hello) return;

    Verdict verdict = judge(in.hello, expected_);
    if (verdict == Verdict::kStranger) {
      warn("a connection without the token of this group was refused");
      return in.fd.reset();
    }
    const int peer = static_cast<int>(in.hello.sender);
    if (verdict == Verdict::kWelcome && topology_.node_of[peer] == topology_.node)
      verdict = Verdict::kRank;
    Farewell farewell;
    if (verdict == Verdict::kWelcome && links_[peer] != nullptr &&
        links_[peer]->look(&farewell) == Link::Peer::kAlive)
      verdict = Verdict::kRank;  // the token is good for one connection of each rank
    HelloReply reply;
    reply.verdict = verdict;
    reply.generation = options_.generation;
    reply.rank = static_cast<uint32_t>(options_.rank);
    reply.size = expected_.size;
    const bool said =
        ::send(in.fd.get(), &reply, sizeof reply, MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof reply;
    if (verdict != Verdict::kWelcome)
      warn(fmt::format("rank {} of version {} and generation {:#x} was refused", in.hello.sender,
                       in.hello.version, in.hello.generation));
    if (verdict != Verdict::kWelcome || !said) return in.fd.reset();
    adopt(peer, std::move(in.fd));
  }

  void adopt(int peer, UniqueFd fd) {
    if (links_[peer] == nullptr) --missing_;
    links_[peer] = std::make_unique<TcpLink>(std::move(fd), options_.generation);
  }

  void check_link(int peer) {
    Farewell farewell;
    const Link::Peer state = links_[peer]->look(&farewell);
    if (state == Link::Peer::kAlive || state == Link::Peer::kUnread) return;
    if (!farewell.fault.text.empty()) throw FaultError(farewell.fault);
    throw FaultError({Code::kUnavailable, peer,
                      fmt::format("{} was lost while the group was forming: {}", where(peer),
                                  links_[peer]->why())});
  }

  std::string where(int peer) const {
    const Member& member = options_.members[peer];
    return fmt::format("{} at {} port {}", topology_.names[peer], member.data_address,
                       member.data_port);
  }

  int first_missing() const {
    for (int peer = 0; peer < topology_.size(); ++peer)
      if (topology_.node_of[peer] != topology_.node && links_[peer] == nullptr) return peer;
    return -1;
  }

  std::string describe_missing() const {
    std::string text;
    const auto add = [&](const std::string& one) { text += (text.empty() ? "" : "; ") + one; };
    for (const Outgoing& out : outgoing_)
      if (out.stage != Outgoing::Stage::kDone)
        add(fmt::format("{}: {}", where(out.peer), out.problem));
    for (int peer = options_.rank + 1; peer < topology_.size(); ++peer)
      if (topology_.node_of[peer] != topology_.node && links_[peer] == nullptr)
        add(fmt::format("{}: has not connected to this rank at {} port {}", topology_.names[peer],
                        options_.members[options_.rank].data_address,
                        options_.members[options_.rank].data_port));
    return text;
  }

  void warn(const std::string& text) {
    if (++warnings_ <= kMaxWarnings)
      log_warn("{}: {}{}", topology_.names[options_.rank], text,
               warnings_ == kMaxWarnings ? " (further ones are not shown)" : "");
  }

  const GroupOptions& options_;
  const Topology& topology_;
  int listener_;
  Deadline deadline_;
  Watch* watch_;
  Hello expected_;
  std::vector<std::unique_ptr<Link>> links_;
  std::vector<Outgoing> outgoing_;
  std::vector<Incoming> incoming_;
  std::vector<pollfd> polled_;
  int missing_ = 0;
  int warnings_ = 0;
};

}  // namespace

std::vector<std::unique_ptr<Link>> connect_links(const GroupOptions& options,
                                                 const Topology& topology, int listener,
                                                 Deadline deadline, Watch* watch) {
  return Mesh(options, topology, listener, deadline, watch).run();
}

}  // namespace phalanx::comm
