#include "apps/doctor_listen.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <thread>

#include "apps/doctor_probe.h"
#include "apps/doctor_rehearsal.h"
#include "apps/doctor_tls.h"
#include "apps/doctor_wire.h"
#include "apps/rank_spec.h"
#include "phalanx/base/error.h"
#include "phalanx/net/address.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

constexpr size_t kMostSessions = 64;
constexpr double kSessionSeconds = 120;  // of silence
constexpr double kFirstByteSeconds = 5;
constexpr double kMessageSeconds = 10;
constexpr int kPollMs = 100;
constexpr double kMostMemorySeconds = 3;
constexpr double kTurnSeconds = 10;
constexpr size_t kLargestDatagram = 65536;

struct Socket {
  UniqueFd fd;
  bool udp = false;
  bool doctor = false;
  uint16_t data_port = 0;  // one that PHALANX_DATA_PORTS names
};

}  // namespace

struct DoctorListener::State {
  explicit State(const DoctorOptions& o) : options(o) {}

  struct Session {
    int fd = -1;  // owned by the thread's stream
    std::atomic<bool> done{false};
    std::thread thread;
  };

  // A rehearsal between its two messages, with the data ports that it was lent.
  struct Stage {
    explicit Stage(State& s) : state(s) {}
    ~Stage() {
      const std::lock_guard lock(state.mutex);
      for (const size_t i : lent) state.lent.erase(i);
    }
    State& state;
    std::unique_lock<std::timed_mutex> turn;  // nothing else is measured meanwhile
    std::set<size_t> lent;
    std::unique_ptr<Rehearsal> rehearsal;
  };

  void open_ports();
  void run();
  void accept_one(const Socket& socket);
  void answer_datagrams(int fd);
  void serve(UniqueFd connection, int server);
  json answer(DoctorStream& stream, const json& message, int server, Stage& stage);
  json open_rehearsal(const json& message, Stage& stage);
  json rehearse(const json& message, Stage& stage);
  std::optional<int> server_at(const std::string& address) const {
    for (size_t i = 0; i < options.table.servers.size(); ++i)
      if (net::same_address(options.address(static_cast<int>(i)), address)) return static_cast<int>(i);
    return std::nullopt;
  }

  const DoctorOptions options;
  std::vector<Socket> sockets;
  std::vector<DoctorPort> ports;
  std::vector<char> datagram = std::vector<char>(kLargestDatagram);
  std::atomic<bool> stop{false};
  std::atomic<int64_t> strangers{0}, sessions_seen{0};
  std::mutex mutex;
  std::list<Session> sessions;             // guarded by mutex
  std::set<size_t> lent;                   // sockets that a rehearsal accepts on; guarded by mutex
  std::map<int, std::string> tls_verdict;  // of each server's latest handshake; guarded by mutex
  std::timed_mutex measuring;              // one measurement at a time
  std::thread thread;
};

void DoctorListener::State::open_ports() {
  const std::string& own = options.address(options.own_server);
  const auto tcp = [&](int port) {
    return bind_doctor_socket(own, static_cast<uint16_t>(port), SOCK_STREAM);
  };
  sockets.push_back({.fd = tcp(options.port), .doctor = true});
  sockets.push_back({.fd = bind_doctor_socket(own, static_cast<uint16_t>(options.port), SOCK_DGRAM),
                     .udp = true});
  const int large = 4 << 20;
  ::setsockopt(sockets.back().fd.get(), SOL_SOCKET, SO_RCVBUF, &large, sizeof large);
  ports.push_back({options.port, "doctor", ""});
  const auto hold = [&](int port, const std::string& purpose) {
    try {
      UniqueFd fd = tcp(port);
      sockaddr_storage at{};
      socklen_t size = sizeof at;
      ::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&at), &size);
      in_port_t bound = 0;  // at the same place for both families
      std::memcpy(&bound, reinterpret_cast<const char*>(&at) + offsetof(sockaddr_in, sin_port),
                  sizeof bound);
      const uint16_t data_port = purpose == "data" ? ntohs(bound) : uint16_t{0};
      sockets.push_back({.fd = std::move(fd), .data_port = data_port});
      ports.push_back({ntohs(bound), purpose, ""});
    } catch (const Error& e) {
      ports.push_back({port, purpose, e.what()});
    }
  };
  if (options.control_port != options.port) hold(options.control_port, "control");
  if (options.data_begin == 0) hold(0, "any");
  const int last = std::min(options.data_end, options.data_begin + kDoctorMostPorts - 1);
  for (int port = options.data_begin; port > 0 && port <= last; ++port)
    if (port != options.port && port != options.control_port) hold(port, "data");
}

void DoctorListener::State::run() {
  std::vector<pollfd> waits;
  for (const Socket& socket : sockets) waits.push_back({socket.fd.get(), POLLIN, 0});
  while (!stop) {
    {
      const std::lock_guard lock(mutex);
      for (size_t i = 0; i < waits.size(); ++i)
        waits[i].fd = lent.contains(i) ? -1 : sockets[i].fd.get();
    }
    const int ready = ::poll(waits.data(), waits.size(), kPollMs);
    for (size_t i = 0; ready > 0 && i < waits.size(); ++i) {
      if (waits[i].revents == 0) continue;
      if (sockets[i].udp)
        answer_datagrams(sockets[i].fd.get());
      else
        accept_one(sockets[i]);
    }
    const std::lock_guard lock(mutex);
    std::erase_if(sessions, [](Session& session) {
      if (!session.done) return false;
      session.thread.join();
      return true;
    });
  }
}

void DoctorListener::State::accept_one(const Socket& socket) {
  sockaddr_storage from{};
  socklen_t size = sizeof from;
  UniqueFd connection(::accept4(socket.fd.get(), reinterpret_cast<sockaddr*>(&from), &size,
                                SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!connection.valid()) return;
  const std::optional<int> server = server_at(address_text(from));
  if (!server) {
    ++strangers;
    return;
  }
  if (!socket.doctor) return;  // to be open is all
  const std::lock_guard lock(mutex);
  if (sessions.size() >= kMostSessions) return;
  ++sessions_seen;
  Session& session = sessions.emplace_back();
  session.fd = connection.get();
  session.thread = std::thread([this, &session, server, fd = connection.release()]() mutable {
    try {
      serve(UniqueFd(::fcntl(fd, F_DUPFD_CLOEXEC, 0)), *server);
    } catch (const std::exception&) {
      // The other side sees the end of the connection and says what it lacks.
    }
    {
      const std::lock_guard held(mutex);
      ::close(fd);
      session.fd = -1;
    }
    session.done = true;
  });
}

void DoctorListener::State::answer_datagrams(int fd) {
  for (int i = 0; i < 1000; ++i) {  // then connections get their turn
    sockaddr_storage from{};
    socklen_t size = sizeof from;
    DoctorDatagram head;
    const ssize_t n = ::recvfrom(fd, datagram.data(), datagram.size(), MSG_DONTWAIT,
                                 reinterpret_cast<sockaddr*>(&from), &size);
    if (n < 0) return;
    if (static_cast<size_t>(n) < sizeof head) continue;
    std::memcpy(&head, datagram.data(), sizeof head);
    if (head.magic != DoctorDatagram::kMagic) continue;
    if (!server_at(address_text(from))) {
      ++strangers;
      continue;
    }
    (void)::sendto(fd, &head, sizeof head, MSG_DONTWAIT, reinterpret_cast<sockaddr*>(&from), size);
  }
}

void DoctorListener::State::serve(UniqueFd connection, int server) {
  const int one = 1;
  ::setsockopt(connection.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  pollfd p{connection.get(), POLLIN, 0};
  const Deadline first = Deadline::in_seconds(kFirstByteSeconds);
  while (!stop && !first.passed() && ::poll(&p, 1, first.poll_ms(kPollMs)) == 0) {
  }
  unsigned char byte = 0;
  if (::recv(connection.get(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) != 1) return;
  if (byte == 0x16) {  // a TLS handshake; a frame begins with 0
    const std::string verdict = answer_tls(options, server, std::move(connection));
    const std::lock_guard lock(mutex);
    tls_verdict[server] = verdict;
    return;
  }
  DoctorStream stream(std::move(connection), options.address(server));
  Stage stage(*this);
  while (!stop) {
    const std::optional<json> message = stream.receive(Deadline::in_seconds(kSessionSeconds));
    if (!message) return;
    json reply;
    try {
      reply = answer(stream, *message, server, stage);
    } catch (const json::exception&) {
      reply = {{"error", "a message that this doctor does not understand; is it another version?"}};
    }
    stream.send(reply, Deadline::in_seconds(kMessageSeconds));
  }
}

json DoctorListener::State::open_rehearsal(const json& message, Stage& stage) {
  const auto ranks = message.at("ranks").get<std::vector<int>>();
  const int total = message.at("total").get<int>();
  const auto is_own = [&](int rank) {
    return rank >= 0 && rank < total && options.table.server_of_rank(rank) == options.own_server;
  };
  if (total < 1 || total > options.table.world_size || ranks.empty() || stage.rehearsal ||
      !std::is_sorted(ranks.begin(), ranks.end(), std::less_equal<>()) ||
      !std::all_of(ranks.begin(), ranks.end(), is_own))
    return {{"error", "a rehearsal that is not of this node's ranks"}};
  // The one before may be just ending.
  stage.turn = std::unique_lock(measuring, std::chrono::duration<double>(kTurnSeconds));
  if (!stage.turn) return {{"error", "something else is being measured on this node"}};
  std::vector<Rehearsal::Port> data;
  {
    const std::lock_guard lock(mutex);
    for (size_t i = 0; i < sockets.size() && data.size() < ranks.size(); ++i) {
      if (sockets[i].data_port == 0 || !lent.insert(i).second) continue;
      stage.lent.insert(i);
      data.push_back({sockets[i].fd.get(), sockets[i].data_port});
    }
  }
  // Until run() has seen that they are lent.
  if (!data.empty()) std::this_thread::sleep_for(std::chrono::milliseconds(2 * kPollMs));
  stage.rehearsal = std::make_unique<Rehearsal>(options, ranks, total, data);
  return {{"ports", stage.rehearsal->ports()}};
}

json DoctorListener::State::rehearse(const json& message, Stage& stage) {
  if (!stage.rehearsal) return {{"error", "no rehearsal was opened"}};
  std::vector<RehearsalWork> works;
  for (const json& work : message.at("works").get_ref<const json::array_t&>())
    works.push_back(rehearsal_work_from_json(work));
  const double seconds = std::clamp(message.at("seconds").get<double>(), 0.0, kMostMemorySeconds);
  const std::vector<RehearsalResult> results =
      stage.rehearsal->run(members_from_json(message.at("members")),
                           token_from_hex(message.at("token").get<std::string>()), works, seconds);
  json list = json::array();
  for (const RehearsalResult& r : results)
    list.push_back({{"steps", r.steps}, {"step_s", r.step_s}, {"compute_s", r.compute_s}});
  return {{"results", list}};
}

json DoctorListener::State::answer(DoctorStream& stream, const json& message, int server,
                                   Stage& stage) {
  const auto& op = message.at("op").get_ref<const std::string&>();
  if (op == "clock") return {{"ns", wall_clock_ns()}};
  if (op == "describe") {
    NodeReport node = describe_node(options);
    node.ports = ports;
    json reply = to_json(node);
    reply["doctor"] = kDoctorVersion;
    return reply;
  }
  if (op == "memory") {
    const std::lock_guard lock(measuring);
    const double seconds = std::clamp(message.at("seconds").get<double>(), 0.0, kMostMemorySeconds);
    const MemorySpeed speed = measure_memory(seconds);
    return {{"bytes_per_s", speed.read_bytes_per_s},
            {"flops_per_s", speed.flops_per_s},
            {"problem", speed.problem}};
  }
  if (op == "echo") {
    const Deadline deadline = Deadline::in_seconds(kMessageSeconds);
    const int count = std::clamp(message.at("count").get<int>(), 0, kEchoMost);
    stream.send({{"ok", true}}, deadline);
    std::array<char, kEchoBytes> bytes{};
    for (int i = 0; i < count; ++i) {
      if (!stream.read_all(bytes, deadline)) break;
      stream.write_all(bytes, deadline);
    }
    return {{"ok", true}};
  }
  if (op == "sink") {
    const Deadline deadline = Deadline::in_seconds(kMessageSeconds);
    stream.send({{"ok", true}}, deadline);
    std::vector<char> bytes(1 << 20);
    int64_t sum = 0;
    int64_t begin = 0;
    int64_t last = 0;
    while (sum < 2 * kTransferMost) {
      const size_t n = stream.read_some(bytes, deadline);
      last = now_ns();
      if (n == 0) break;
      if (begin == 0) begin = last;  // what has come by then does not count
      else sum += static_cast<int64_t>(n);
    }
    return {{"bytes", sum}, {"ns", last - begin}};
  }
  if (op == "tls") {
    const std::lock_guard lock(mutex);
    return {{"verdict", tls_verdict[server]}};
  }
  try {
    if (op == "rehearse_open") return open_rehearsal(message, stage);
    if (op == "rehearse") return rehearse(message, stage);
  } catch (const Error& e) {
    return {{"error", e.what()}};
  }
  if (op == "probe") {
    const int to = message.at("to").get<int>();
    if (to < 0 || to >= static_cast<int>(options.table.servers.size()) || to == options.own_server)
      return {{"error", fmt::format("server {} is no other node of the rank table here", to)}};
    return to_json(probe_link(options, to, doctor_ports_from_json(message.at("ports"))));
  }
  return {{"error", "a request that this doctor does not know; is it another version?"}};
}

DoctorListener::DoctorListener(const DoctorOptions& options)
    : state_(std::make_unique<State>(options)) {
  state_->open_ports();
  state_->thread = std::thread([state = state_.get()] { state->run(); });
}

DoctorListener::~DoctorListener() {
  state_->stop = true;
  state_->thread.join();
  {
    const std::lock_guard lock(state_->mutex);
    for (State::Session& session : state_->sessions)
      if (session.fd >= 0) ::shutdown(session.fd, SHUT_RDWR);
  }
  for (State::Session& session : state_->sessions) session.thread.join();
}

const std::vector<DoctorPort>& DoctorListener::ports() const { return state_->ports; }
int64_t DoctorListener::strangers() const { return state_->strangers; }
int64_t DoctorListener::sessions() const { return state_->sessions_seen; }

}  // namespace phalanx::apps
