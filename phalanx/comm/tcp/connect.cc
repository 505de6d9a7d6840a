#include "phalanx/comm/tcp/connect.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <optional>

#include "phalanx/base/log.h"
#include "phalanx/base/log_limit.h"
#include "phalanx/comm/tcp/address.h"
#include "phalanx/comm/tcp/hello.h"
#include "phalanx/comm/tcp/tcp_link.h"
#include "phalanx/comm/tcp/tls_link.h"
#include "phalanx/net/tls_material.h"

namespace phalanx::comm {

namespace {

constexpr int kSliceMs = 50;
constexpr size_t kMaxHandshakes = 64;  // connections that have not proved themselves yet
constexpr std::chrono::seconds kHandshake{2};
// The kernel asks again ever more rarely: a network that is back would be noticed late.
constexpr std::chrono::seconds kUnanswered{1};
constexpr std::chrono::milliseconds kFirstRetry{10};
constexpr std::chrono::milliseconds kLastRetry{500};
constexpr std::chrono::seconds kReportEvery{5};

std::string errno_text(int error) {
  return fmt::format("{} (errno {})", std::strerror(error), error);
}

// A socket, in clear or under TLS, until it is a link. Moves bytes as Link does.
struct Pipe {
  UniqueFd clear;
  std::unique_ptr<net::TlsStream> tls;
  bool wants_write = false;  // during the handshake

  [[nodiscard]] int fd() const { return tls ? tls->fd() : clear.get(); }
  [[nodiscard]] bool open() const { return fd() >= 0; }
  void close() {
    clear.reset();
    tls.reset();
  }
  // True when bytes may flow. Throws nothing: a failure leaves the stream failed.
  net::TlsStream::State shake() {
    const auto state = tls->handshake();
    wants_write = state == net::TlsStream::State::kWantsWrite;
    return state;
  }
  // All of a few bytes, which an empty socket buffer always takes.
  bool send_all(const void* bytes, size_t size) {
    if (!tls)
      return ::send(clear.get(), bytes, size, MSG_NOSIGNAL | MSG_DONTWAIT) ==
             static_cast<ssize_t>(size);
    const iovec run{const_cast<void*>(bytes), size};
    return tls->send_some({&run, 1}) == static_cast<int64_t>(size);
  }
  // Bytes, 0 for "not now", -1 for a failure (errno is 0 at an orderly end).
  int64_t recv_some(void* bytes, size_t size) {
    if (tls) {
      const iovec run{bytes, size};
      return tls->recv_some({&run, 1});
    }
    const ssize_t count = ::recv(clear.get(), bytes, size, MSG_DONTWAIT);
    if (count > 0) return count;
    if (count < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
    if (count == 0) errno = 0;
    return -1;
  }
  [[nodiscard]] std::string why() const {
    return tls ? tls->why() : errno == 0 ? std::string() : errno_text(errno);
  }
};

// A connection of this rank to a lower one, until it is a link.
struct Outgoing {
  enum class Stage { kWaiting, kConnecting, kHandshake, kSendingHello, kAwaitingReply, kDone };
  int peer = 0;
  Stage stage = Stage::kWaiting;
  Pipe pipe;
  Clock::time_point next_try{};
  Clock::time_point unanswered{};  // while connecting: then it is tried anew
  std::chrono::milliseconds retry = kFirstRetry;
  std::string problem = "not tried yet";
  HelloReply reply;
  size_t received = 0;
};

// A connection somebody made to the listener, until it has proved itself.
struct Incoming {
  Pipe pipe;
  bool shaken = false;  // the handshake is over, or there is none
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
    if (options.tls != nullptr) {
      // Which node a certificate must be of: that of the rank it connects to or claims to be, so
      // it is asked when that is known; here that it is of some node of this group.
      const auto role_problem = [](const net::CertificateInfo& peer) -> std::string {
        const std::string role = peer.role();
        if (role.empty() || role.starts_with("inter-node")) return {};
        return fmt::format("certificate of the peer, {}: certificate is of another role: found {}, "
                           "expected inter-node",
                           net::who(peer), role);
      };
      const auto identity = [this, role_problem](const net::CertificateInfo& peer) -> std::string {
        if (std::string wrong = role_problem(peer); !wrong.empty()) return wrong;
        std::string members;
        for (const Member& member : options_.members) {
          if (peer.names(member.data_address)) return {};
          members += (members.empty() ? "one of " : ", ") + member.data_address;
        }
        auto wrong = net::identity_problem(peer, {members}, "", "certificate of the peer");
        return phalanx::to_string(*wrong);
      };
      const auto refused = [this](const std::string& sentence) { warn("refused: " + sentence); };
      server_.emplace(options.tls, net::TlsContext::Options{.side = net::TlsContext::Side::kServer,
                                                            .identity = identity,
                                                            .refused = refused});
      client_.emplace(options.tls, net::TlsContext::Options{.side = net::TlsContext::Side::kClient,
                                                            .identity = role_problem});
    }
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
      if (out.stage == Outgoing::Stage::kConnecting && now >= out.unanswered)
        retry_later(out, "no answer to the connection");
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
      const bool shaking = out.stage == Outgoing::Stage::kHandshake;
      const bool writing = out.stage == Outgoing::Stage::kConnecting ||
                           out.stage == Outgoing::Stage::kSendingHello ||
                           (shaking && out.pipe.wants_write);
      const bool open = writing || shaking || out.stage == Outgoing::Stage::kAwaitingReply;
      polled_.push_back({open ? out.pipe.fd() : -1, static_cast<short>(writing ? POLLOUT : POLLIN),
                         0});
    }
    const size_t handshakes = incoming_.size();
    for (const Incoming& in : incoming_)
      polled_.push_back(
          {in.pipe.fd(), static_cast<short>(in.pipe.wants_write ? POLLOUT : POLLIN), 0});
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
    std::erase_if(incoming_, [](const Incoming& in) { return !in.pipe.open(); });
    for (size_t peer = 0; peer < links_.size(); ++peer)
      if (polled_[at + peer].revents != 0 && links_[peer] != nullptr)
        check_link(static_cast<int>(peer));
    if (polled_[0].revents != 0) accept_some();
  }

  void retry_later(Outgoing& out, std::string problem) {
    out.pipe.close();
    out.problem = std::move(problem);
    out.stage = Outgoing::Stage::kWaiting;
    out.next_try = Clock::now() + out.retry;
    out.retry = std::min(out.retry * 2, kLastRetry);
  }

  void connect(Outgoing& out) {
    const Member& peer = options_.members[out.peer];
    SocketAddress target = parse_address(peer.data_address, peer.data_port);
    UniqueFd& fd = out.pipe.clear;
    fd.reset(::socket(target.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd.valid()) return retry_later(out, errno_text(errno));
    tune_data_socket(fd.get());
    bind_to_own_address(fd.get(), target.storage.ss_family);
    if (::connect(fd.get(), target.get(), target.size) != 0 && errno != EINPROGRESS)
      return retry_later(out, errno_text(errno));
    out.stage = Outgoing::Stage::kConnecting;
    out.unanswered = Clock::now() + kUnanswered;
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
      ::getsockopt(out.pipe.fd(), SOL_SOCKET, SO_ERROR, &error, &size);
      if (error != 0) return retry_later(out, errno_text(error));
      out.stage = Outgoing::Stage::kSendingHello;
      if (client_) {
        out.pipe.tls = std::make_unique<net::TlsStream>(*client_, std::move(out.pipe.clear));
        out.stage = Outgoing::Stage::kHandshake;
        out.problem = "connected, but its TLS handshake has not ended";
      }
    }
    if (out.stage == Outgoing::Stage::kHandshake) {
      const auto state = out.pipe.shake();
      if (state == net::TlsStream::State::kFailed)
        return retry_later(out, handshake_failure(out.pipe.why()));
      if (state != net::TlsStream::State::kDone) return;
      const auto peer = out.pipe.tls->peer();
      if (auto wrong = net::identity_problem(peer->info(),
                                             {options_.members[out.peer].data_address}, "",
                                             "certificate of " + topology_.names[out.peer]))
        return retry_later(out, phalanx::to_string(*wrong));
      out.stage = Outgoing::Stage::kSendingHello;
    }
    if (out.stage == Outgoing::Stage::kSendingHello) {
      Hello hello = expected_;
      hello.sender = static_cast<uint32_t>(options_.rank);
      hello.receiver = static_cast<uint32_t>(out.peer);
      if (!out.pipe.send_all(&hello, sizeof hello)) return retry_later(out, out.pipe.why());
      out.stage = Outgoing::Stage::kAwaitingReply;
      out.problem = "connected, but it has not answered (not forming the group yet?)";
      return;
    }
    auto* bytes = reinterpret_cast<std::byte*>(&out.reply);
    const int64_t count =
        out.pipe.recv_some(bytes + out.received, sizeof out.reply - out.received);
    if (count == 0) return;
    if (count < 0) {
      const std::string why = out.pipe.why();
      if (out.pipe.tls != nullptr && !out.pipe.tls->closed_quietly())
        return retry_later(out, handshake_failure(why));
      if (!why.empty() && out.pipe.tls == nullptr) return retry_later(out, why);
      return retry_later(out, "it closed the connection without an answer (another token or not a "
                              "rank of this group?)");
    }
    out.received += static_cast<size_t>(count);
    if (out.received < sizeof out.reply) return;
    if (out.reply.magic != Hello::kMagic)
      return retry_later(out, "what listens there does not speak this protocol");
    if (out.reply.verdict != Verdict::kWelcome) refuse(out);
    out.stage = Outgoing::Stage::kDone;
    adopt(out.peer, std::move(out.pipe));
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
      case Verdict::kIdentity:
        why = fmt::format("this rank's certificate, {}, is not one of {}. Fix: phalanx certs init "
                          "with the rank table in use",
                          net::who(options_.tls->own()),
                          options_.members[options_.rank].data_address);
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
      tune_data_socket(fd.get());
      if (incoming_.size() >= kMaxHandshakes) {
        // A true peer speaks at once, so the oldest silent one is the least likely to be one.
        incoming_.erase(incoming_.begin());
        warn("too many connections that have said nothing; the oldest was closed");
      }
      Incoming& in = incoming_.emplace_back();
      in.until = Clock::now() + kHandshake;
      in.shaken = !server_;
      if (server_)
        in.pipe.tls = std::make_unique<net::TlsStream>(*server_, std::move(fd));
      else
        in.pipe.clear = std::move(fd);
      hear(in);
      if (!in.pipe.open()) incoming_.pop_back();
    }
  }

  void hear(Incoming& in) {
    if (!in.shaken) {
      const auto state = in.pipe.shake();
      if (state == net::TlsStream::State::kFailed) {
        if (!in.pipe.tls->refused()) warn("a TLS handshake failed: " + in.pipe.why());
        return in.pipe.close();
      }
      if (state != net::TlsStream::State::kDone) return;
      in.shaken = true;
    }
    auto* bytes = reinterpret_cast<std::byte*>(&in.hello);
    const int64_t count = in.pipe.recv_some(bytes + in.received, sizeof in.hello - in.received);
    if (count == 0) return;
    if (count < 0) return in.pipe.close();
    in.received += static_cast<size_t>(count);
    if (in.received < sizeof in.hello) return;

    Verdict verdict = judge(in.hello, expected_);
    if (verdict == Verdict::kStranger) {
      warn("a connection without the token of this group was refused");
      return in.pipe.close();
    }
    const int peer = static_cast<int>(in.hello.sender);
    if (verdict == Verdict::kWelcome && in.pipe.tls != nullptr) {
      if (auto wrong = net::identity_problem(in.pipe.tls->peer()->info(),
                                             {options_.members[peer].data_address}, "",
                                             "certificate of " + topology_.names[peer])) {
        warn("refused: " + phalanx::to_string(*wrong));
        verdict = Verdict::kIdentity;
      }
    }
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
    const bool said = in.pipe.send_all(&reply, sizeof reply);
    if (verdict != Verdict::kWelcome)
      warn(fmt::format("rank {} of version {} and generation {:#x} was refused", in.hello.sender,
                       in.hello.version, in.hello.generation));
    if (verdict != Verdict::kWelcome || !said) return in.pipe.close();
    adopt(peer, std::move(in.pipe));
  }

  void adopt(int peer, Pipe pipe) {
    if (links_[peer] == nullptr) --missing_;
    if (pipe.tls != nullptr)
      links_[peer] = std::make_unique<TlsLink>(std::move(pipe.tls), options_.generation);
    else
      links_[peer] = std::make_unique<TcpLink>(std::move(pipe.clear), options_.generation);
  }

  // The peer judges this rank's certificate after this rank has judged the peer's, so a refusal
  // shows as an alert.
  std::string handshake_failure(const std::string& why) const {
    return fmt::format("TLS handshake failed: {}. This rank's certificate is {}, valid until {}; "
                       "if the peer refused it, its log says why. Fix: certificates of one authority "
                       "on all nodes (phalanx certs init), and TLS on or off on all of them",
                       why, net::who(options_.tls->own()),
                       net::time_text(options_.tls->own().not_after));
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
    std::string note;
    if (warnings_.allow(&note)) log_warn("{}: {}{}", topology_.names[options_.rank], text, note);
  }

  const GroupOptions& options_;
  const Topology& topology_;
  int listener_;
  Deadline deadline_;
  Watch* watch_;
  Hello expected_;
  std::optional<net::TlsContext> server_, client_;  // neither: in the clear
  std::vector<std::unique_ptr<Link>> links_;
  std::vector<Outgoing> outgoing_;
  std::vector<Incoming> incoming_;
  std::vector<pollfd> polled_;
  int missing_ = 0;
  LogLimit warnings_;
};

}  // namespace

std::vector<std::unique_ptr<Link>> connect_links(const GroupOptions& options,
                                                 const Topology& topology, int listener,
                                                 Deadline deadline, Watch* watch) {
  return Mesh(options, topology, listener, deadline, watch).run();
}

}  // namespace phalanx::comm
