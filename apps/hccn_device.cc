#include "apps/hccn_device.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <memory>

#include "apps/config_environment.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/cluster/rank_table.h"
#include "phalanx/net/address.h"

namespace phalanx::apps {
namespace {

constexpr size_t kMostBytes = 64 << 10;

struct Interface {
  std::string name;
  std::string address;
  std::string netmask;
  bool loopback = false;
};

std::string text_of(const sockaddr* address) {
  char text[INET6_ADDRSTRLEN] = "";
  if (address == nullptr) return "";
  if (address->sa_family == AF_INET)
    ::inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(address)->sin_addr, text, sizeof text);
  else if (address->sa_family == AF_INET6)
    ::inet_ntop(AF_INET6, &reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr, text,
                sizeof text);
  return text;
}

// In the system's order, those that loop back last; the first address of each that has one.
std::vector<Interface> interfaces_up(bool all_addresses) {
  ifaddrs* first = nullptr;
  if (::getifaddrs(&first) != 0)
    throw Error(Code::kUnavailable,
                fmt::format("the network interfaces cannot be listed: {}", std::strerror(errno)));
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> owner(first, ::freeifaddrs);
  std::vector<Interface> found;
  for (const int family : {AF_INET, AF_INET6}) {
    for (const ifaddrs* i = first; i != nullptr; i = i->ifa_next) {
      if (i->ifa_addr == nullptr || i->ifa_addr->sa_family != family) continue;
      if ((i->ifa_flags & IFF_UP) == 0) continue;
      const bool known = std::any_of(found.begin(), found.end(),
                                     [&](const Interface& f) { return f.name == i->ifa_name; });
      if (known && !all_addresses) continue;
      found.push_back({i->ifa_name, text_of(i->ifa_addr), text_of(i->ifa_netmask),
                       (i->ifa_flags & IFF_LOOPBACK) != 0});
    }
  }
  std::stable_partition(found.begin(), found.end(), [](const Interface& i) { return !i.loopback; });
  return found;
}

HccnDevice device_at(const std::string& address, const std::string& netmask) {
  HccnDevice device{.address = address, .netmask = netmask};
  const auto parsed = net::Address::parse(address);
  for (const Interface& i : interfaces_up(true)) {
    const bool is_it = net::same_address(i.address, address) ||
                       (i.loopback && parsed && parsed->is_loopback());
    if (!is_it) continue;
    device.interface = i.name;
    if (device.netmask.empty()) device.netmask = i.netmask;
    break;
  }
  return device;
}

const cluster::Server* own_server(const cluster::RankTable& table, const Environment& environment,
                                  const std::string& path) {
  const std::string container = variable(environment, "MIES_CONTAINER_IP");
  const std::string host = variable(environment, "HOST_IP");
  if (!container.empty() || !host.empty())
    return &table.servers[static_cast<size_t>(
        cluster::find_own_server(table, container, host, path))];
  for (const cluster::Server& server : table.servers)
    if (net::is_local(server.address())) return &server;
  return nullptr;
}

}  // namespace

HccnConf::HccnConf(std::string path) : path_(std::move(path)) {
  const UniqueFd file(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file.valid()) {
    if (errno == ENOENT) return;
    throw Error(Code::kInvalidArgument, fmt::format("{}: {}", path_, std::strerror(errno)));
  }
  std::string text(kMostBytes + 1, '\0');
  size_t size = 0;
  while (size < text.size()) {
    const ssize_t got = ::read(file.get(), text.data() + size, text.size() - size);
    if (got < 0) throw Error(Code::kInvalidArgument, fmt::format("{}: {}", path_, std::strerror(errno)));
    if (got == 0) break;
    size += static_cast<size_t>(got);
  }
  if (size > kMostBytes)
    throw Error(Code::kInvalidArgument, fmt::format("{}: larger than {} bytes", path_, kMostBytes));
  text.resize(size);
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    lines_.push_back(text.substr(at, end - at));
    at = end + 1;
  }
}

std::string HccnConf::get(const std::string& key, int device) const {
  const std::string prefix = fmt::format("{}_{}=", key, device);
  for (const std::string& line : lines_) {
    if (!line.starts_with(prefix)) continue;
    const size_t last = line.find_last_not_of(" \t\r");
    return line.substr(prefix.size(), last + 1 - prefix.size());
  }
  return "";
}

int HccnConf::devices() const {
  int count = 0;
  constexpr std::string_view kKey = "address_";
  for (const std::string& line : lines_) {
    if (!line.starts_with(kKey)) continue;
    int device = 0;
    const auto [end, error] =
        std::from_chars(line.data() + kKey.size(), line.data() + line.size(), device);
    if (error == std::errc() && end != line.data() + line.size() && *end == '=' && device >= 0 &&
        device < 1024)
      count = std::max(count, device + 1);
  }
  return count;
}

void HccnConf::set(const std::map<std::string, std::string>& values, int device) {
  const auto fail = [&](int error) {
    const bool rights = error == EACCES || error == EPERM || error == EROFS;
    throw Error(rights ? Code::kPermissionDenied : Code::kUnknown,
                fmt::format("{}: {}", path_, std::strerror(error)));
  };
  const std::string lock_path = path_ + ".lock";
  const UniqueFd lock(::open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!lock.valid()) fail(errno);
  if (::flock(lock.get(), LOCK_EX | LOCK_NB) != 0)
    throw Error(Code::kUnavailable, path_ + " is being written by another process");
  lines_ = HccnConf(path_).lines_;  // what it is now that nobody else writes
  for (const auto& [key, value] : values) {
    const std::string prefix = fmt::format("{}_{}=", key, device);
    const auto at = std::find_if(lines_.begin(), lines_.end(),
                                 [&](const std::string& line) { return line.starts_with(prefix); });
    if (at == lines_.end())
      lines_.push_back(prefix + value);
    else
      *at = prefix + value;
  }
  const std::string fresh = path_ + ".new";
  const UniqueFd file(
      ::open(fresh.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644));
  if (!file.valid()) fail(errno);
  std::string text;
  for (const std::string& line : lines_) text += line + "\n";
  if (::write(file.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size())) fail(errno);
  if (::fsync(file.get()) != 0 || ::rename(fresh.c_str(), path_.c_str()) != 0) fail(errno);
}

std::vector<HccnDevice> hccn_devices(const HccnConf& conf, const Environment& environment) {
  std::vector<HccnDevice> devices;
  for (int i = 0; i < conf.devices(); ++i) {
    const std::string address = conf.get("address", i);
    devices.push_back(address.empty() ? HccnDevice{} : device_at(address, conf.get("netmask", i)));
  }
  if (!devices.empty()) return devices;
  std::string path = variable(environment, "RANK_TABLE_FILE");
  if (path.empty()) path = variable(environment, "RANKTABLEFILE");
  if (!path.empty()) {
    const cluster::RankTable table = cluster::load_rank_table(path);
    if (const cluster::Server* own = own_server(table, environment, path)) {
      for (const cluster::Device& device : own->devices) {
        const auto at = static_cast<size_t>(std::clamp(device.device_id, 0, 1023));
        if (devices.size() <= at) devices.resize(at + 1);
        devices[at] = device_at(device.device_ip.empty() ? own->address() : device.device_ip, "");
      }
      return devices;
    }
  }
  for (const Interface& i : interfaces_up(false))
    devices.push_back({.address = i.address, .netmask = i.netmask, .interface = i.name});
  return devices;
}

}  // namespace phalanx::apps
