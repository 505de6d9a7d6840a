#include "apps/hccn.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <fstream>
#include <functional>
#include <optional>
#include <set>
#include <sstream>
#include <string_view>

#include "apps/config_environment.h"
#include "apps/hccn_device.h"
#include "apps/icmp_ping.h"
#include "phalanx/net/address.h"

namespace phalanx::apps {
namespace {

constexpr int kPackets = 3;
constexpr int kDefaultBytes = 4096;
constexpr int kMostBytes = 65507;
constexpr std::chrono::milliseconds kDeadline{1000};

// Ends the command: a text of the tool on stderr, then perhaps a line of ours.
struct Refusal {
  int status;
  std::string text;
  std::string note;
};

const Refusal kNoMajor{3, "Get invalid major cmd.\nEnter [ hccn_tool -h ] for more details.", ""};

struct Call {
  int device = 0;
  bool all = false;
  bool set = false;
  std::string command;
  std::vector<std::string> rest;
};

struct Place {
  const Call& call;
  int number;
  const HccnDevice& device;
  HccnConf& conf;
};

std::optional<int> to_number(const std::string& text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// "address 10.0.0.1 pkt 64" as pairs of known names.
std::map<std::string, std::string> options_of(const Call& call, const std::set<std::string>& known) {
  std::map<std::string, std::string> options;
  for (size_t i = 0; i < call.rest.size(); ++i) {
    const std::string& name = call.rest[i];
    if (!known.contains(name))
      throw Refusal{3, "Get unknown option!", "found \"" + name + "\""};
    if (name == "-inet6") {
      options[name] = "1";
      continue;
    }
    if (i + 1 == call.rest.size())
      throw Refusal{4, "The total count of input parameters is wrong!",
                    "\"" + name + "\" has no value"};
    options[name] = call.rest[++i];
  }
  return options;
}

std::string valid_address(const std::map<std::string, std::string>& options,
                          const std::string& name) {
  const auto at = options.find(name);
  if (at == options.end())
    throw Refusal{4, "The total count of input parameters is wrong!",
                  "\"" + name + "\" is missing"};
  if (!net::Address::parse(at->second))
    throw Refusal{6, "The ip address you configured is invalid!",
                  fmt::format("{}: found \"{}\"", name, at->second)};
  return at->second;
}

void write_conf(Place& p, const std::map<std::string, std::string>& values) {
  try {
    p.conf.set(values, p.number);
  } catch (const Error& e) {
    if (e.code() == Code::kPermissionDenied)
      throw Refusal{1, "permission denied: pls check this cmd run permission.", e.what()};
    if (e.code() == Code::kUnavailable)
      throw Refusal{1, "hccn_tool is busy, please try again.", e.what()};
    throw;
  }
  fmt::print("Cmd executed successfully!\n");
}

int ip(Place& p) {
  if (p.call.set) {
    const auto options = options_of(p.call, {"address", "netmask"});
    const std::string address = valid_address(options, "address");
    if (!net::is_local(address))
      throw Refusal{6, "The ip address you configured is invalid!",
                    fmt::format("{} is no address of this machine, which has {}; this command names "
                                "the address of a device, it does not give one to an interface",
                                address, net::own_addresses_text())};
    write_conf(p, {{"address", address}, {"netmask", valid_address(options, "netmask")}});
    return 0;
  }
  if (p.device.address.empty())
    throw Refusal{13, "Get ipconf failed, because no ip was preset there!", ""};
  fmt::print("ipaddr:{}\nnetmask:{}\n", p.device.address, p.device.netmask);
  return 0;
}

int ping(Place& p) {
  const auto options = options_of(p.call, {"address", "ipv6_address", "pkt", "-inet6"});
  const bool v6 = options.contains("-inet6") || options.contains("ipv6_address");
  const std::string target = valid_address(options, v6 ? "ipv6_address" : "address");
  int bytes = kDefaultBytes;
  if (const auto at = options.find("pkt"); at != options.end()) {
    const auto given = to_number(at->second);
    if (!given || *given < 0 || *given > kMostBytes)
      throw Refusal{1, "Get invalid parameters!",
                    fmt::format("pkt: found \"{}\", expected 0 to {}", at->second, kMostBytes)};
    bytes = *given;
  }
  Pinger pinger(target, p.device.address);
  if (pinger.by_udp())
    fmt::print(stderr, "note: no right to send ICMP here; asked by UDP to a closed port\n");
  const bool is_v6 = target.find(':') != std::string::npos;
  fmt::print("device {} {} {}\n", p.number, is_v6 ? "PING6" : "PING", target);
  int received = 0;
  for (int i = 0; i < kPackets; ++i) {
    const auto reply = pinger.ask(static_cast<uint16_t>(i), static_cast<size_t>(bytes), kDeadline);
    switch (reply.kind) {
      case Pinger::Reply::Kind::kAnswered:
        ++received;
        fmt::print("recv seq={},time={:.6f}ms\n", i,
                   std::chrono::duration<double, std::milli>(reply.time).count());
        break;
      case Pinger::Reply::Kind::kTimeout: fmt::print("recv time out seq={}\n", i); break;
      case Pinger::Reply::Kind::kTooLong: fmt::print("Message too long\n"); break;
      case Pinger::Reply::Kind::kUnreachable: fmt::print("Destination Host Unreachable\n"); break;
    }
    std::fflush(stdout);
  }
  fmt::print("{} packets transmitted, {} received, {:.2f}% packet loss\n", kPackets, received,
             100.0 * (kPackets - received) / kPackets);
  if (received < kPackets) throw Refusal{1, "Command execute failed!", ""};
  return 0;
}

std::string of_interface(const Place& p, const std::string& file) {
  std::ifstream in("/sys/class/net/" + p.device.interface + "/" + file);
  std::string text;
  std::getline(in, text);
  return text;
}

bool link_up(const Place& p) {
  if (p.device.interface.empty()) return false;
  const std::string state = of_interface(p, "operstate");
  return state == "up" || state == "unknown";  // a loopback interface has no carrier to know of
}

int link(Place& p) {
  fmt::print("link status: {}\n", link_up(p) ? "UP" : "DOWN");
  return 0;
}

std::string netdetect_address(const Place& p) {
  const std::string found = p.conf.get("netdetect", p.number);
  return found.empty() ? "0.0.0.0" : found;
}

int net_health(Place& p) {
  const std::string target = netdetect_address(p);
  std::string_view status = "Init";
  if (const auto address = net::Address::parse(target); !address) {
    status = "Unknown";
  } else if (!address->is_all_zero()) {
    try {
      Pinger pinger(target, p.device.address);
      switch (pinger.ask(0, 56, kDeadline).kind) {
        case Pinger::Reply::Kind::kAnswered: status = "Success"; break;
        case Pinger::Reply::Kind::kUnreachable: status = "Unreachable"; break;
        default: status = "Receive timeout"; break;
      }
    } catch (const Error&) {
      status = "Socket fail";
    }
  }
  fmt::print("net health status: {}\n", status);
  return 0;
}

int netdetect(Place& p) {
  if (p.call.set)
    write_conf(p, {{"netdetect", valid_address(options_of(p.call, {"address"}), "address")}});
  else
    fmt::print("netdetect address: {}\n", netdetect_address(p));
  return 0;
}

// Of the kernel's table: the default route of this interface, as text.
std::string default_route(const std::string& interface) {
  std::ifstream in("/proc/net/route");
  std::string line;
  while (std::getline(in, line)) {
    std::istringstream fields(line);
    std::string name;
    std::string to;
    std::string by;
    fields >> name >> to >> by;
    if (name != interface || to != "00000000" || by.size() != 8 || by == to) continue;
    uint32_t v = 0;
    std::from_chars(by.data(), by.data() + 8, v, 16);
    return fmt::format("{}.{}.{}.{}", v & 255, v >> 8 & 255, v >> 16 & 255, v >> 24);
  }
  return "";
}

int gateway(Place& p) {
  if (p.call.set) {
    write_conf(p, {{"gateway", valid_address(options_of(p.call, {"gateway"}), "gateway")}});
    return 0;
  }
  std::string found = p.conf.get("gateway", p.number);
  if (found.empty()) found = default_route(p.device.interface);
  if (found.empty())
    throw Refusal{2, "Get gateway failed, because no gateway was preset there!", ""};
  fmt::print("default gateway:{}, Iface:{}\n", found, p.device.interface);
  return 0;
}

int tls(Place& p) {
  constexpr std::string_view kNote =
      "note: this switch is kept for scripts and has no effect; traffic between nodes is encrypted "
      "as interNodeTLSEnabled says ('phalanx certs show', docs/security.md)\n";
  if (p.call.set) {
    const auto options = options_of(p.call, {"enable"});
    const auto at = options.find("enable");
    if (at == options.end() || (at->second != "0" && at->second != "1"))
      throw Refusal{1, "Get invalid parameters!", "enable: expected 0 or 1"};
    write_conf(p, {{"tls_enable", at->second}});
    fmt::print(stderr, kNote);
    return 0;
  }
  fmt::print("dev_id:{}, tls switch[{}](0:disable, 1:enable), tls preconfigured[0](0:non-preset, "
             "1:preset), tls alarm time threshold[60]days\n",
             p.number, p.conf.get("tls_enable", p.number) == "1" ? 1 : 0);
  fmt::print("No certificate found, please set certs firstly!\n");
  fmt::print(stderr, kNote);
  return 0;
}

int lldp(Place&) {
  fmt::print(stderr, "note: no neighbour is known: this machine listens to no LLDP\n");
  return 0;
}

int mac(Place& p) {
  fmt::print("mac addr: {}\n", of_interface(p, "address"));
  return 0;
}

int mtu(Place& p) {
  fmt::print("mtu:{}\n", of_interface(p, "mtu"));
  return 0;
}

int statistics(Place& p) {
  fmt::print("packet statistics:\n");
  constexpr auto kNames = std::to_array<std::pair<std::string_view, std::string_view>>({
      {"mac_tx_total_pkt_num", "tx_packets"},
      {"mac_tx_total_oct_num", "tx_bytes"},
      {"mac_tx_bad_pkt_num", "tx_errors"},
      {"mac_tx_drop_pkt_num", "tx_dropped"},
      {"mac_rx_total_pkt_num", "rx_packets"},
      {"mac_rx_total_oct_num", "rx_bytes"},
      {"mac_rx_bad_pkt_num", "rx_errors"},
      {"mac_rx_drop_pkt_num", "rx_dropped"},
  });
  for (const auto& [name, file] : kNames)
    fmt::print("{}:{}\n", name, of_interface(p, fmt::format("statistics/{}", file)));
  return 0;
}

struct Command {
  std::string_view name;
  int (*run)(Place&);
  bool sets;
  bool needs_interface;
};

constexpr Command kCommands[] = {
    {"-ip", ip, true, false},          {"-ping", ping, false, false},
    {"-link", link, false, false},     {"-net_health", net_health, false, false},
    {"-netdetect", netdetect, true, false}, {"-gateway", gateway, true, false},
    {"-tls", tls, true, false},        {"-lldp", lldp, false, false},
    {"-mac", mac, false, true},        {"-mtu", mtu, false, true},
    {"-stat", statistics, false, true},
};

const Command& command_of(const std::string& name) {
  for (const Command& command : kCommands)
    if (command.name == name) return command;
  Refusal no = kNoMajor;
  if (name == "-optical" || name == "-fec" || name == "-vnic" || name == "-hccs_ping" ||
      name == "-link_stat")
    no.note = name + " asks for hardware that this machine does not have";
  throw no;
}

void usage() {
  fmt::print(
      "usage: hccn_tool -i <device> <command> -g|-s [arguments]\n"
      "       hccn_tool -a <command> -g            (all devices)\n\n"
      "  -ip -g | -s address A netmask M    -ping -g address A [pkt BYTES] | -inet6 ipv6_address A\n"
      "  -link -g                           -net_health -g\n"
      "  -netdetect -g | -s address A       -gateway -g | -s gateway A\n"
      "  -tls -g | -s enable 0|1            -lldp -g\n"
      "  -mac -g   -mtu -g   -stat -g\n\n"
      "Device N is, in this order: of /etc/hccn.conf (PHALANX_HCCN_CONF names another file), of the\n"
      "own entry of the rank table in RANK_TABLE_FILE, the Nth network interface.\n");
}

Call parse(const std::vector<std::string>& arguments) {
  if (arguments.empty()) throw Refusal{4, "The total count of input parameters is wrong!", ""};
  Call call;
  bool placed = false;
  bool acts = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& a = arguments[i];
    if (a == "-i" && !placed) {
      const auto device =
          i + 1 < arguments.size() ? to_number(arguments[i + 1]) : std::optional<int>();
      if (!device || *device < 0) throw Refusal{4, "Get invalid device id.", ""};
      call.device = *device;
      placed = true;
      ++i;
    } else if (a == "-a" && !placed) {
      placed = call.all = true;
    } else if ((a == "-g" || a == "-s") && !acts) {
      acts = true;
      call.set = a == "-s";
    } else if (call.command.empty() && a.starts_with("-")) {
      call.command = a;
    } else {
      call.rest.push_back(a);
    }
  }
  if (!placed)
    throw Refusal{1, R"(Get invalid major cmd type. The valid major cmd type should be "-a" or "-i".)",
                  ""};
  if (call.command.empty()) throw kNoMajor;
  const Command& command = command_of(call.command);
  if (!acts) throw Refusal{4, "The total count of input parameters is wrong!", "-g or -s is missing"};
  if (call.set && !command.sets)
    throw Refusal{3, "Get unknown option!", call.command + " has no -s"};
  if (!call.set && call.command != "-ping" && !call.rest.empty())
    throw Refusal{3, "Get unknown option!", "found \"" + call.rest[0] + "\""};
  if (call.all && call.set) throw Refusal{1, "Get invalid parameters!", "-a goes with -g only"};
  return call;
}

int run(const Call& call) {
  const Environment environment = process_environment();
  const std::string path = variable(environment, "PHALANX_HCCN_CONF");
  HccnConf conf(path.empty() ? "/etc/hccn.conf" : path);
  const std::vector<HccnDevice> devices = hccn_devices(conf, environment);
  const auto count = static_cast<int>(devices.size());
  if (!call.all && call.device >= count)
    throw Refusal{4, "Get invalid device id.",
                  fmt::format("found {}, this machine has {} (0 to {})", call.device, count, count - 1)};
  const Command& command = command_of(call.command);
  int status = 0;
  for (int i = call.all ? 0 : call.device; i < (call.all ? count : call.device + 1); ++i) {
    const HccnDevice& device = devices[static_cast<size_t>(i)];
    if (command.needs_interface && device.interface.empty())
      throw Refusal{1, "Execute failed: Link status is down.",
                    fmt::format("no interface that is up has the address of device {}, \"{}\"", i,
                                device.address)};
    Place place{.call = call, .number = i, .device = device, .conf = conf};
    status = std::max(status, command.run(place));
  }
  return status;
}

}  // namespace

int hccn_main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (std::find(arguments.begin(), arguments.end(), "-h") != arguments.end()) {
    usage();
    return 0;
  }
  try {
    return run(parse(arguments));
  } catch (const Refusal& refusal) {
    std::fflush(stdout);
    fmt::print(stderr, "{}\n", refusal.text);
    if (!refusal.note.empty()) fmt::print(stderr, "{}\n", refusal.note);
    return refusal.status;
  }
}

}  // namespace phalanx::apps
