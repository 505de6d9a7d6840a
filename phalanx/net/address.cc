#include "phalanx/net/address.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <fmt/format.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>

#include "phalanx/base/error.h"
#include "phalanx/base/unique_fd.h"

namespace phalanx::net {
namespace {

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t size = 0;
};

std::optional<SocketAddress> socket_address(std::string_view text, uint16_t port) {
  const std::string copy(text);
  SocketAddress result;
  sockaddr_in v4{};
  sockaddr_in6 v6{};
  if (::inet_pton(AF_INET, copy.c_str(), &v4.sin_addr) == 1) {
    v4.sin_family = AF_INET;
    v4.sin_port = htons(port);
    std::memcpy(&result.storage, &v4, sizeof v4);
    result.size = sizeof v4;
    return result;
  }
  if (::inet_pton(AF_INET6, copy.c_str(), &v6.sin6_addr) == 1) {
    v6.sin6_family = AF_INET6;
    v6.sin6_port = htons(port);
    std::memcpy(&result.storage, &v6, sizeof v6);
    result.size = sizeof v6;
    return result;
  }
  return std::nullopt;
}

// 0, or errno of socket() or bind(). `fd` receives the bound socket.
int bind_socket(const SocketAddress& address, int type, UniqueFd& fd) {
  fd.reset(::socket(address.storage.ss_family, type | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return errno;
  if (type == SOCK_STREAM) {
    const int one = 1;  // as servers do: connections in TIME_WAIT do not occupy the port
    ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  }
  const auto* sa = reinterpret_cast<const sockaddr*>(&address.storage);
  return ::bind(fd.get(), sa, address.size) == 0 ? 0 : errno;
}

// Inodes of TCP sockets that listen on the port, from /proc/net/tcp*.
std::vector<std::string> listening_inodes(uint16_t port) {
  std::vector<std::string> inodes;
  for (const char* file : {"/proc/net/tcp", "/proc/net/tcp6"}) {
    std::ifstream in(file);
    std::string line;
    std::getline(in, line);
    while (std::getline(in, line)) {
      std::istringstream fields(line);
      std::string slot, local, remote, state, queues, timer, retransmits, uid, timeout, inode;
      fields >> slot >> local >> remote >> state >> queues >> timer >> retransmits >> uid >>
          timeout >> inode;
      if (state == "0A" && local.ends_with(fmt::format(":{:04X}", port))) inodes.push_back(inode);
    }
  }
  return inodes;
}

// "phalanx, pid 12": the process that holds one of the sockets, if we may look at it.
std::string holder(const std::vector<std::string>& inodes) {
  if (inodes.empty()) return {};
  DIR* proc = ::opendir("/proc");
  if (proc == nullptr) return {};
  std::string found;
  while (const dirent* entry = ::readdir(proc)) {
    const std::string pid = entry->d_name;
    if (!std::all_of(pid.begin(), pid.end(), [](char c) { return c >= '0' && c <= '9'; })) continue;
    const std::string folder = "/proc/" + pid + "/fd";
    DIR* fds = ::opendir(folder.c_str());
    if (fds == nullptr) continue;
    while (const dirent* fd = ::readdir(fds)) {
      char target[64];
      const ssize_t n =
          ::readlink((folder + "/" + fd->d_name).c_str(), target, sizeof target);
      if (n <= 0) continue;
      const std::string_view link(target, static_cast<size_t>(n));
      for (const std::string& inode : inodes) {
        if (link != "socket:[" + inode + "]") continue;
        std::string name;
        std::getline(std::ifstream("/proc/" + pid + "/comm"), name);
        found = fmt::format("{}, pid {}", name, pid);
      }
      if (!found.empty()) break;
    }
    ::closedir(fds);
    if (!found.empty()) break;
  }
  ::closedir(proc);
  return found;
}

}  // namespace

std::optional<Address> Address::parse(std::string_view text) {
  if (text.size() > 45 || text.find('\0') != std::string_view::npos) return std::nullopt;
  const std::string copy(text);
  Address address;
  if (::inet_pton(AF_INET, copy.c_str(), address.bytes_) == 1) return address;
  address.v6_ = true;
  if (::inet_pton(AF_INET6, copy.c_str(), address.bytes_) == 1) return address;
  return std::nullopt;
}

bool Address::is_all_zero() const {
  return std::all_of(std::begin(bytes_), std::end(bytes_), [](uint8_t b) { return b == 0; });
}

bool Address::is_loopback() const {
  if (!v6_) return bytes_[0] == 127;
  return std::all_of(bytes_, bytes_ + 15, [](uint8_t b) { return b == 0; }) && bytes_[15] == 1;
}

std::string Address::text() const {
  char buffer[INET6_ADDRSTRLEN];
  return ::inet_ntop(v6_ ? AF_INET6 : AF_INET, bytes_, buffer, sizeof buffer);
}

bool same_address(std::string_view a, std::string_view b) {
  const auto left = Address::parse(a);
  const auto right = Address::parse(b);
  return left && right ? *left == *right : a == b;
}

std::string endpoint(std::string_view address, uint16_t port) {
  const bool bracket = address.find(':') != std::string_view::npos;
  return fmt::format(fmt::runtime(bracket ? "[{}]:{}" : "{}:{}"), address, port);
}

bool is_local(std::string_view address) {
  const auto sa = socket_address(address, 0);
  UniqueFd fd;
  return sa && bind_socket(*sa, SOCK_DGRAM, fd) == 0;
}

std::vector<OwnAddress> own_addresses() {
  std::vector<OwnAddress> result;
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) return result;
  for (const int family : {AF_INET, AF_INET6}) {
    for (const ifaddrs* i = list; i != nullptr; i = i->ifa_next) {
      if (i->ifa_addr == nullptr || i->ifa_addr->sa_family != family) continue;
      if ((i->ifa_flags & IFF_UP) == 0) continue;
      char text[INET6_ADDRSTRLEN];
      const void* bytes =
          family == AF_INET
              ? static_cast<const void*>(&reinterpret_cast<sockaddr_in*>(i->ifa_addr)->sin_addr)
              : &reinterpret_cast<sockaddr_in6*>(i->ifa_addr)->sin6_addr;
      if (::inet_ntop(family, bytes, text, sizeof text) != nullptr)
        result.push_back({text, i->ifa_name});
    }
  }
  ::freeifaddrs(list);
  return result;
}

std::string own_addresses_text() {
  std::string text;
  for (const OwnAddress& own : own_addresses())
    text += fmt::format("{}{} ({})", text.empty() ? "" : ", ", own.address, own.interface);
  return text.empty() ? "none" : text;
}

std::string resolve(const std::string& host) {
  if (const auto address = Address::parse(host)) return address->text();
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* list = nullptr;
  const int error = ::getaddrinfo(host.c_str(), nullptr, &hints, &list);
  if (error != 0) {
    throw Error(Code::kNotFound, fmt::format("host name '{}' cannot be resolved: {}", host,
                                             ::gai_strerror(error)));
  }
  std::string result;
  for (const int family : {AF_INET, AF_INET6}) {
    for (const addrinfo* i = list; i != nullptr && result.empty(); i = i->ai_next) {
      if (i->ai_family != family) continue;
      char text[NI_MAXHOST];
      if (::getnameinfo(i->ai_addr, i->ai_addrlen, text, sizeof text, nullptr, 0,
                        NI_NUMERICHOST) == 0)
        result = text;
    }
  }
  ::freeaddrinfo(list);
  if (result.empty())
    throw Error(Code::kNotFound, fmt::format("host name '{}' has no IPv4 or IPv6 address", host));
  return result;
}

std::string port_problem(std::string_view address, uint16_t port) {
  const auto sa = socket_address(address, port);
  if (!sa) return fmt::format("'{}' is not an IPv4 or IPv6 address", address);
  UniqueFd fd;
  int error = bind_socket(*sa, SOCK_STREAM, fd);
  if (error == 0 && ::listen(fd.get(), 1) != 0) error = errno;
  if (error == 0) return {};
  if (error == EADDRNOTAVAIL) {
    return fmt::format("address {} is not on this machine, which has {}", address,
                       own_addresses_text());
  }
  if (error == EADDRINUSE) {
    const std::string who = holder(listening_inodes(port));
    return who.empty() ? "Address already in use"
                       : fmt::format("Address already in use (by {})", who);
  }
  return std::strerror(error);
}

std::optional<uint16_t> first_free_port(std::string_view address, uint16_t begin, uint16_t end) {
  for (uint32_t port = begin; port <= end; ++port) {
    if (port_problem(address, static_cast<uint16_t>(port)).empty())
      return static_cast<uint16_t>(port);
  }
  return std::nullopt;
}

}  // namespace phalanx::net
