#include "apps/doctor_wire.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>

#include <cerrno>
#include <cstring>
#include <ctime>
#include <nlohmann/json.hpp>

#include "phalanx/base/error.h"
#include "phalanx/base/json.h"
#include "phalanx/cluster/join_check.h"
#include "phalanx/net/address.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

constexpr int kMostDepth = 8;
constexpr int64_t kSpinNs = 200'000;

}  // namespace

DoctorAddress::DoctorAddress(const std::string& address, uint16_t port) {
  sockaddr_in v4{};
  sockaddr_in6 v6{};
  if (::inet_pton(AF_INET, address.c_str(), &v4.sin_addr) == 1) {
    v4.sin_family = AF_INET;
    v4.sin_port = htons(port);
    std::memcpy(&storage, &v4, size = sizeof v4);
  } else if (::inet_pton(AF_INET6, address.c_str(), &v6.sin6_addr) == 1) {
    v6.sin6_family = AF_INET6;
    v6.sin6_port = htons(port);
    std::memcpy(&storage, &v6, size = sizeof v6);
  } else {
    throw Error(Code::kInvalidArgument,
                fmt::format("\"{}\" is no numeric address; the doctor needs one", address));
  }
}

std::string address_text(const sockaddr_storage& storage) {
  char text[INET6_ADDRSTRLEN] = "";
  if (storage.ss_family == AF_INET) {
    sockaddr_in v4{};
    std::memcpy(&v4, &storage, sizeof v4);
    ::inet_ntop(AF_INET, &v4.sin_addr, text, sizeof text);
  } else if (storage.ss_family == AF_INET6) {
    sockaddr_in6 v6{};
    std::memcpy(&v6, &storage, sizeof v6);
    ::inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof text);
  }
  const auto parsed = net::Address::parse(text);
  return parsed ? parsed->text() : std::string(text);
}

UniqueFd bind_doctor_socket(const std::string& address, uint16_t port, int type) {
  const DoctorAddress at(address, port);
  UniqueFd fd(::socket(at.storage.ss_family, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const int one = 1;
  if (fd.valid() && type == SOCK_STREAM)
    ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (!fd.valid() || ::bind(fd.get(), at.get(), at.size) != 0 ||
      (type == SOCK_STREAM && ::listen(fd.get(), 64) != 0)) {
    const int error = errno;
    throw Error(Code::kUnavailable,
                fmt::format("{} port {} of {}: {}", type == SOCK_STREAM ? "TCP" : "UDP", port, address,
                            std::strerror(error)));
  }
  return fd;
}

std::vector<Dialled> dial(const std::string& own, const std::string& peer,
                          const std::vector<int>& ports, Deadline deadline) {
  std::vector<Dialled> tries(ports.size());
  std::vector<pollfd> waits;
  std::vector<size_t> of_wait;
  for (size_t i = 0; i < ports.size(); ++i) {
    const DoctorAddress from(own, 0);
    const DoctorAddress to(peer, static_cast<uint16_t>(ports[i]));
    Dialled& t = tries[i];
    t.fd.reset(::socket(to.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    const int one = 1;
    if (t.fd.valid()) ::setsockopt(t.fd.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (!t.fd.valid() || ::bind(t.fd.get(), from.get(), from.size) != 0) {
      t.error = errno;
      continue;
    }
    if (::connect(t.fd.get(), to.get(), to.size) == 0) continue;
    t.error = errno;
    if (errno != EINPROGRESS) continue;
    waits.push_back({t.fd.get(), POLLOUT, 0});
    of_wait.push_back(i);
  }
  for (size_t left = waits.size(); left > 0 && !deadline.passed();) {
    if (::poll(waits.data(), waits.size(), deadline.poll_ms(200)) <= 0) continue;
    for (size_t w = 0; w < waits.size(); ++w) {
      if (waits[w].fd < 0 || waits[w].revents == 0) continue;
      socklen_t size = sizeof(int);
      ::getsockopt(waits[w].fd, SOL_SOCKET, SO_ERROR, &tries[of_wait[w]].error, &size);
      waits[w].fd = -1;
      --left;
    }
  }
  for (Dialled& t : tries) {
    if (t.error == EINPROGRESS) t.error = ETIMEDOUT;
    if (t.error != 0) t.fd.reset();
  }
  return tries;
}

std::string dial_state(int error) {
  if (error == 0) return "open";
  if (error == ECONNREFUSED || error == ECONNRESET) return "closed";
  return error == ETIMEDOUT ? "blocked" : "unreachable";
}

DoctorStream::DoctorStream(UniqueFd fd, std::string who) : fd_(std::move(fd)), who_(std::move(who)) {}

void DoctorStream::wait(short events, Deadline deadline, const char* what) {
  pollfd p{fd_.get(), events, 0};
  for (;;) {
    const int ready = ::poll(&p, 1, deadline.poll_ms(1000));
    if (ready > 0) return;
    if (deadline.passed())
      throw Error(Code::kDeadlineExceeded, fmt::format("{} {} in time", who_, what));
  }
}

void DoctorStream::write_all(std::span<const char> bytes, Deadline deadline) {
  while (!bytes.empty()) {
    const ssize_t n = ::send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      bytes = bytes.subspan(static_cast<size_t>(n));
    } else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      wait(POLLOUT, deadline, "takes no bytes");
    } else if (n < 0 && errno != EINTR) {
      throw Error(Code::kUnavailable, fmt::format("{}: {}", who_, std::strerror(errno)));
    }
  }
}

size_t DoctorStream::read_some(std::span<char> bytes, Deadline deadline) {
  const int64_t begin = now_ns();
  for (;;) {
    const ssize_t n = ::recv(fd_.get(), bytes.data(), bytes.size(), MSG_DONTWAIT);
    if (n >= 0) return static_cast<size_t>(n);
    if (errno == EINTR) continue;
    if (errno != EAGAIN && errno != EWOULDBLOCK)
      throw Error(Code::kUnavailable, fmt::format("{}: {}", who_, std::strerror(errno)));
    if (now_ns() - begin > kSpinNs)
      wait(POLLIN, deadline, "sent nothing");
    else
      ::sched_yield();  // the peer may be on this core
  }
}

bool DoctorStream::read_all(std::span<char> bytes, Deadline deadline) {
  for (size_t done = 0; done < bytes.size();) {
    const size_t n = read_some(bytes.subspan(done), deadline);
    if (n == 0 && done == 0) return false;
    if (n == 0) throw Error(Code::kUnavailable, fmt::format("{} closed inside a message", who_));
    done += n;
  }
  return true;
}

void DoctorStream::send(const json& message, Deadline deadline) {
  const std::string text = message.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > kDoctorFrameBytes)
    throw Error(Code::kInternal, fmt::format("a message of {} bytes for {}", text.size(), who_));
  const uint32_t length = htonl(static_cast<uint32_t>(text.size()));
  std::string frame(sizeof length, '\0');
  std::memcpy(frame.data(), &length, sizeof length);
  write_all(frame + text, deadline);
}

std::optional<json> DoctorStream::receive(Deadline deadline) {
  uint32_t length = 0;
  if (!read_all({reinterpret_cast<char*>(&length), sizeof length}, deadline)) return std::nullopt;
  length = ntohl(length);
  if (length > kDoctorFrameBytes)
    throw Error(Code::kInvalidArgument,
                fmt::format("{}: a message of {} bytes, at most {} are taken: it is no doctor", who_,
                            length, kDoctorFrameBytes));
  std::string text(length, '\0');
  if (length > 0 && !read_all(text, deadline))
    throw Error(Code::kUnavailable, fmt::format("{} closed inside a message", who_));
  json message = parse_json(text, who_, kMostDepth);
  if (!message.is_object())
    throw Error(Code::kInvalidArgument, fmt::format("{}: a message that is no object", who_));
  return message;
}

json DoctorStream::ask(const json& message, Deadline deadline) {
  send(message, deadline);
  std::optional<json> reply = receive(deadline);
  if (!reply) throw Error(Code::kUnavailable, fmt::format("{} closed without an answer", who_));
  if (const auto error = reply->find("error"); error != reply->end() && error->is_string())
    if (const auto& text = error->get_ref<const std::string&>(); !text.empty() && reply->size() == 1)
      throw Error(Code::kUnavailable,
                  fmt::format("{}: {}", who_, cluster::printable(text, 500)));
  return *reply;
}

int64_t wall_clock_ns() {
  timespec t{};
  ::clock_gettime(CLOCK_REALTIME, &t);
  return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

}  // namespace phalanx::apps
