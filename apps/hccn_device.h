#pragma once

#include <map>
#include <string>
#include <vector>

#include "apps/config.h"

namespace phalanx::apps {

// /etc/hccn.conf: lines "address_0=10.0.0.1". Other lines are kept as they are.
class HccnConf {
 public:
  // The file may be absent. Throws Error(kInvalidArgument) if it cannot be read or is over 64 KiB.
  explicit HccnConf(std::string path);

  // "" where there is none.
  [[nodiscard]] std::string get(const std::string& key, int device) const;
  // Writes the file, whole, in place of the old one. Throws Error(kPermissionDenied), or
  // Error(kUnavailable) while another process writes it.
  void set(const std::map<std::string, std::string>& values, int device);
  // 1 + the highest device that has an address.
  [[nodiscard]] int devices() const;

 private:
  std::string path_;
  std::vector<std::string> lines_;
};

// What a "device" of the Ascend tools is here: an address of this machine.
struct HccnDevice {
  std::string address;    // "" : none is configured
  std::string netmask;
  std::string interface;  // "" : the address is on no interface that is up
};

// Of the devices of hccn.conf, else of the own entry of the rank table (RANK_TABLE_FILE), else of the
// interfaces that are up, those that loop back last. Throws Error of the rank table.
[[nodiscard]] std::vector<HccnDevice> hccn_devices(const HccnConf& conf,
                                                   const Environment& environment);

}  // namespace phalanx::apps
