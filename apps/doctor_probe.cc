#include "apps/doctor_probe.h"

#include <fmt/format.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "apps/doctor_tls.h"
#include "phalanx/base/error.h"
#include "phalanx/net/address.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

constexpr double kDialSeconds = 2;
constexpr double kAnswerSeconds = 5;
constexpr int kEchoes = 100;
constexpr int kClockAsks = 9;
constexpr double kTransferSeconds = 0.15;
constexpr int kTransfers = 2;
constexpr int kDatagrams = 200;
constexpr std::chrono::microseconds kDatagramPace{250};
constexpr size_t kDatagramBytes = 256;
constexpr int kIpv4Headers = 28;
constexpr int kIpv6Headers = 48;
constexpr int kLargestDatagram = 65507;

// The median round trip of small messages: raw bytes, answered as they come.
void measure_latency(DoctorStream& stream, LinkReport& link) {
  const Deadline deadline = Deadline::in_seconds(kAnswerSeconds);
  (void)stream.ask({{"op", "echo"}, {"count", kEchoes}}, deadline);
  std::array<char, kEchoBytes> message{};
  std::vector<double> times;
  for (int i = 0; i < kEchoes; ++i) {
    const int64_t begin = now_ns();
    stream.write_all(message, deadline);
    if (!stream.read_all(message, deadline))
      throw Error(Code::kUnavailable, "the connection ended inside an echo");
    times.push_back(static_cast<double>(now_ns() - begin) * 1e-3);
  }
  (void)stream.receive(deadline);
  std::nth_element(times.begin(), times.begin() + kEchoes / 2, times.end());
  link.rtt_us = times[kEchoes / 2];
}

// From the exchange with the shortest round trip, as NTP does.
void compare_clocks(DoctorStream& stream, LinkReport& link) {
  int64_t best = INT64_MAX;
  for (int i = 0; i < kClockAsks; ++i) {
    const int64_t begin = wall_clock_ns();
    const json reply = stream.ask({{"op", "clock"}}, Deadline::in_seconds(kAnswerSeconds));
    const int64_t end = wall_clock_ns();
    const int64_t there = reply.at("ns").get<int64_t>();
    if (end - begin >= best) continue;
    best = end - begin;
    link.clock_ms = (static_cast<double>(there) - static_cast<double>(begin) -
                     static_cast<double>(end - begin) / 2) * 1e-6;
  }
}

// Bytes for a short time over a connection of its own; the receiver's clock and count decide.
void measure_bandwidth(const DoctorOptions& options, LinkReport& link) {
  std::vector<char> chunk(256 << 10, 'x');
  for (int i = 0; i < kTransfers; ++i) {
    DoctorStream stream =
        dial_doctor(options, link.to, Deadline::in_seconds(kDialSeconds));
    const int low = 128 << 10;  // what waits in this socket is not yet on the link
    ::setsockopt(stream.fd(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, &low, sizeof low);
    const Deadline whole = Deadline::in_seconds(10);
    (void)stream.ask({{"op", "sink"}}, whole);
    int64_t sent = 0;
    for (const Deadline end = Deadline::in_seconds(kTransferSeconds);
         !end.passed() && sent < kTransferMost; sent += static_cast<int64_t>(chunk.size()))
      stream.write_all(chunk, whole);
    ::shutdown(stream.fd(), SHUT_WR);
    const auto reply = stream.receive(whole);
    if (!reply) throw Error(Code::kUnavailable, "the connection ended inside a transfer");
    const auto bytes = static_cast<double>(reply->at("bytes").get<int64_t>());
    const auto ns = static_cast<double>(std::max<int64_t>(1, reply->at("ns").get<int64_t>()));
    tcp_info info{};
    socklen_t size = sizeof info;
    if (::getsockopt(stream.fd(), IPPROTO_TCP, TCP_INFO, &info, &size) == 0 &&
        info.tcpi_snd_mss > 0) {
      const double segments = std::max(1.0, static_cast<double>(sent) / info.tcpi_snd_mss);
      const double share = static_cast<double>(info.tcpi_total_retrans) / segments;
      link.retransmitted = std::max(link.retransmitted, share);
    }
    link.bytes_per_s = std::max(link.bytes_per_s, bytes / ns * 1e9);
  }
}

int mtu_of(const std::string& address) {
  std::string name;
  for (const net::OwnAddress& own : net::own_addresses())
    if (net::same_address(own.address, address)) name = own.interface;
  const auto parsed = net::Address::parse(address);
  if (name.empty() && parsed && parsed->is_loopback()) name = "lo";
  const UniqueFd fd(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  ifreq request{};
  if (name.empty() || name.size() >= sizeof request.ifr_name) return 0;
  std::memcpy(request.ifr_name, name.c_str(), name.size());
  return ::ioctl(fd.get(), SIOCGIFMTU, &request) == 0 ? request.ifr_mtu : 0;
}

class Datagrams {
 public:
  Datagrams(const DoctorOptions& options, int to)
      : fd_(bind_doctor_socket(options.address(options.own_server), 0, SOCK_DGRAM)),
        token_(std::random_device{}() + (static_cast<uint64_t>(::getpid()) << 32)) {
    const DoctorAddress peer(options.address(to), static_cast<uint16_t>(options.port));
    v6_ = peer.storage.ss_family == AF_INET6;
    const int probe = v6_ ? IPV6_PMTUDISC_PROBE : IP_PMTUDISC_PROBE;  // never cut into fragments
    ::setsockopt(fd_.get(), v6_ ? int{IPPROTO_IPV6} : int{IPPROTO_IP},
                 v6_ ? IPV6_MTU_DISCOVER : IP_MTU_DISCOVER, &probe, sizeof probe);
    const int large = 4 << 20;
    ::setsockopt(fd_.get(), SOL_SOCKET, SO_RCVBUF, &large, sizeof large);
    ::setsockopt(fd_.get(), SOL_SOCKET, SO_SNDBUF, &large, sizeof large);
    if (::connect(fd_.get(), peer.get(), peer.size) != 0)
      throw Error(Code::kUnavailable, fmt::format("UDP: {}", std::strerror(errno)));
  }
  [[nodiscard]] int headers() const { return v6_ ? kIpv6Headers : kIpv4Headers; }
  void send(uint32_t number, size_t bytes) {
    std::vector<char> packet(bytes);
    const DoctorDatagram head{.number = number, .token = token_};
    std::memcpy(packet.data(), &head, sizeof head);
    (void)::send(fd_.get(), packet.data(), packet.size(), MSG_DONTWAIT);
  }
  // The number of an answer, or nothing by the deadline.
  std::optional<uint32_t> receive(Deadline deadline) {
    for (;;) {
      DoctorDatagram head;
      const ssize_t n = ::recv(fd_.get(), &head, sizeof head, MSG_DONTWAIT);
      if (n == sizeof head && head.magic == DoctorDatagram::kMagic && head.token == token_)
        return head.number;
      if (n >= 0 || errno == EINTR) continue;
      pollfd p{fd_.get(), POLLIN, 0};
      if (deadline.passed() || (::poll(&p, 1, deadline.poll_ms(1000)) == 0 && deadline.passed()))
        return std::nullopt;
    }
  }

 private:
  UniqueFd fd_;
  bool v6_ = false;
  uint64_t token_;
};

// Whole packets only: the largest of the usual sizes that arrives.
void find_mtu(Datagrams& datagrams, int own_mtu, LinkReport& link) {
  link.mtu = own_mtu;
  uint32_t number = 1'000'000;
  for (const int size : {own_mtu, 9000, 8000, 4000, 1500, 1492, 1450, 1400, 1280, 576}) {
    if (size > own_mtu) continue;
    const int payload = std::min(size - datagrams.headers(), kLargestDatagram);
    for (int attempt = 0; attempt < 3; ++attempt) {
      datagrams.send(++number, static_cast<size_t>(payload));
      const Deadline wait = Deadline::in_seconds(0.1 + link.rtt_us * 4e-6);
      while (const auto answer = datagrams.receive(wait)) {
        if (*answer != number) continue;
        link.mtu_arrived = size;
        return;
      }
    }
  }
}

void count_losses(Datagrams& datagrams, LinkReport& link) {
  std::vector<bool> seen(kDatagrams);
  const auto note = [&](Deadline until) {
    while (const auto number = datagrams.receive(until))
      if (*number < static_cast<uint32_t>(kDatagrams)) seen[*number] = true;
  };
  for (uint32_t i = 0; i < kDatagrams; ++i) {
    datagrams.send(i, kDatagramBytes);
    std::this_thread::sleep_for(kDatagramPace);
    note(Deadline::in_seconds(0));
  }
  const Deadline last = Deadline::in_seconds(0.5 + link.rtt_us * 4e-6);
  while (!last.passed() && std::count(seen.begin(), seen.end(), true) < kDatagrams)
    note(Deadline::in_seconds(0.02));
  link.datagrams = kDatagrams;
  link.datagrams_lost = kDatagrams - static_cast<int>(std::count(seen.begin(), seen.end(), true));
}

void try_ports(const DoctorOptions& options, const std::vector<DoctorPort>& ports, LinkReport& link) {
  std::vector<DoctorPort> held;
  for (const DoctorPort& p : ports)
    if (p.problem.empty()) held.push_back(p);
  std::vector<int> numbers;
  for (const DoctorPort& p : held) numbers.push_back(p.port);
  const auto tries = dial(options.address(options.own_server), options.address(link.to), numbers,
                          Deadline::in_seconds(kDialSeconds));
  for (size_t i = 0; i < tries.size(); ++i)
    link.ports.push_back({.port = held[i].port,
                          .purpose = held[i].purpose,
                          .state = dial_state(tries[i].error),
                          .detail = tries[i].error == 0 ? "" : std::strerror(tries[i].error)});
}

}  // namespace

DoctorStream dial_doctor(const DoctorOptions& options, int to, Deadline deadline) {
  const std::string& peer = options.address(to);
  std::vector<Dialled> tries =
      dial(options.address(options.own_server), peer, {options.port}, deadline);
  if (tries[0].error != 0)
    throw Error(Code::kUnavailable,
                fmt::format("doctor port {}: {} ({})", options.port, dial_state(tries[0].error),
                            std::strerror(tries[0].error)));
  return {std::move(tries[0].fd), "the doctor of " + peer};
}

LinkReport probe_link(const DoctorOptions& options, int to, const std::vector<DoctorPort>& ports) {
  LinkReport link{.from = options.own_server, .to = to};
  try {
    try_ports(options, ports, link);
    if (options.tls != nullptr) link.tls = try_tls(options, to);
    DoctorStream stream = dial_doctor(options, to, Deadline::in_seconds(kDialSeconds));
    measure_latency(stream, link);
    compare_clocks(stream, link);
    Datagrams datagrams(options, to);
    if (const int mtu = mtu_of(options.address(options.own_server)); mtu > 0)
      find_mtu(datagrams, mtu, link);
    count_losses(datagrams, link);
    measure_bandwidth(options, link);
  } catch (const std::exception& e) {
    link.error = e.what();
  }
  return link;
}

}  // namespace phalanx::apps
