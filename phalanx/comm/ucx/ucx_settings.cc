#include <cstdlib>
#include <filesystem>

#include "phalanx/comm/ucx/ucx.h"
#include "phalanx/net/address.h"

namespace phalanx::comm {

namespace fs = std::filesystem;

void prepare_environment_for_ucx() {
  const auto unless_set = [](const char* name, const char* value) { ::setenv(name, value, 0); };
  // Else its handlers would replace those of the program, it would patch malloc() for a cache of
  // registrations that staged sends do not need, and it would log to stdout, where answers belong.
  unless_set("UCX_HANDLE_ERRORS", "none");
  unless_set("UCX_MEM_EVENTS", "no");
  unless_set("UCX_LOG_FILE", "stderr");
  // A rendezvous costs a round trip per message: four times the time of 64 KiB on a link of 50 us.
  unless_set("UCX_RNDV_THRESH", "inf");
  unless_set("UCX_TCP_TX_SEG_SIZE", "256k");
  unless_set("UCX_TCP_RX_SEG_SIZE", "256k");
  // For fabrics that tell of a lost peer by no other means.
  unless_set("UCX_KEEPALIVE_INTERVAL", "2s");
}

std::string ucx_devices(const std::string& address, const std::string& sysfs) {
  std::string interface;
  bool loopback = false;
  if (const auto wanted = net::Address::parse(address)) loopback = wanted->is_loopback();
  for (const net::OwnAddress& own : net::own_addresses()) {
    const auto candidate = net::Address::parse(own.address);
    // All of 127.0.0.0/8 is the loopback interface, though it shows one address.
    if (net::same_address(own.address, address) ||
        (loopback && candidate && candidate->is_loopback())) {
      interface = own.interface;
      break;
    }
  }
  if (interface.empty()) return {};
  std::string devices = interface;
  std::error_code none;  // most cards have no such folder
  const fs::path cards = fs::path(sysfs) / "class/net" / interface / "device/infiniband";
  for (const auto& card : fs::directory_iterator(cards, none)) {
    std::error_code no_ports;
    for (const auto& port : fs::directory_iterator(card.path() / "ports", no_ports))
      devices += "," + card.path().filename().string() + ":" + port.path().filename().string();
  }
  return devices;
}

}  // namespace phalanx::comm
