#pragma once

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <string>
#include <string_view>
#include <utility>

#include "phalanx/base/clock.h"
#include "phalanx/base/unique_fd.h"

// A raw HTTP client for tests.
namespace phalanx::api::testing {

class Client {
 public:
  explicit Client(uint16_t port, int receive_buffer = 0) {
    fd_.reset(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (receive_buffer > 0)
      ::setsockopt(fd_.get(), SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ =
        ::connect(fd_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
  }
  [[nodiscard]] bool connected() const { return connected_; }
  bool send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(n));
    }
    return true;
  }
  // Until `end` has come (kept text included), the peer closes, or 10 s pass.
  std::string read_until(std::string_view end) {
    const Deadline deadline = Deadline::in_seconds(10);
    for (;;) {
      const size_t at = end.empty() ? std::string::npos : kept_.find(end);
      if (at != std::string::npos) {
        std::string out = kept_.substr(0, at + end.size());
        kept_.erase(0, out.size());
        return out;
      }
      pollfd p{.fd = fd_.get(), .events = POLLIN, .revents = 0};
      char buffer[65536];
      ssize_t n = 0;
      if (::poll(&p, 1, deadline.poll_ms(10000)) > 0) n = ::recv(fd_.get(), buffer, sizeof buffer, 0);
      if (n <= 0) {
        closed_ = true;
        return std::exchange(kept_, {});
      }
      kept_.append(buffer, static_cast<size_t>(n));
    }
  }
  std::string read_all() { return read_until({}); }
  [[nodiscard]] bool closed() const { return closed_; }
  void close() { fd_.reset(); }

 private:
  UniqueFd fd_;
  bool connected_ = false, closed_ = false;
  std::string kept_;
};

struct Reply {
  int status = 0;
  std::string head, body;
  [[nodiscard]] bool has(std::string_view header) const {
    return head.find(header) != std::string::npos;
  }
};

// Takes apart a whole answer; chunks are joined.
inline Reply parse_reply(const std::string& text) {
  Reply reply;
  const size_t end = text.find("\r\n\r\n");
  if (end == std::string::npos || text.size() < 12) return reply;
  reply.status = std::stoi(text.substr(9, 3));
  reply.head = text.substr(0, end + 2);
  reply.body = text.substr(end + 4);
  if (!reply.has("Transfer-Encoding: chunked")) return reply;
  std::string joined;
  size_t at = 0;
  while (at < reply.body.size()) {
    const size_t line = reply.body.find("\r\n", at);
    if (line == std::string::npos) break;
    const size_t size = std::stoul(reply.body.substr(at, line - at), nullptr, 16);
    if (size == 0) break;
    joined += reply.body.substr(line + 2, size);
    at = line + 2 + size + 2;
  }
  reply.body = joined;
  return reply;
}

inline std::string post_text(std::string_view path, std::string_view body,
                             std::string_view headers = {}) {
  return fmt::format("POST {} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n{}\r\n{}", path, body.size(),
                     headers, body);
}

// An answer of any kind, read to its end.
inline Reply ask(uint16_t port, const std::string& request) {
  Client client(port);
  client.send(request);
  std::string text = client.read_until("\r\n\r\n");
  if (text.find("Transfer-Encoding: chunked") != std::string::npos)
    text += client.read_until("0\r\n\r\n");
  else
    text += client.read_all();
  return parse_reply(text);
}
inline Reply post(uint16_t port, std::string_view path, std::string_view body,
                  std::string_view headers = {}) {
  return ask(port, post_text(path, body, headers));
}
inline Reply fetch(uint16_t port, std::string_view path) {
  return ask(port, fmt::format("GET {} HTTP/1.1\r\nHost: x\r\n\r\n", path));
}

}  // namespace phalanx::api::testing
