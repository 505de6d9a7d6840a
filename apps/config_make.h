#pragma once

// `phalanx config make`: writes a config.json with every key that has an effect.

#include <string>
#include <vector>

namespace phalanx::apps {

struct ConfigMakeOptions {
  std::string model;             // modelWeightPath
  std::string name = "model";    // modelName
  bool multi_node = false;       // multiNodesInferEnabled
  int world_size = 1;            // worldSize and npuDeviceIds; the rank table wins
  std::string ip = "127.0.0.1";  // ipAddress
  std::string management_ip;     // managementIpAddress; empty: as ipAddress
  int port = 1025, management_port = 1026, metrics_port = 1027, multi_node_port = 1120;
  std::vector<std::string> set;  // "BackendConfig.ScheduleConfig.maxBatchSize=32"
};

// The text of the file. Throws Error(kInvalidArgument) for a bad entry of `set`.
[[nodiscard]] std::string make_config_json(const ConfigMakeOptions& options);

// `phalanx config make ...`; argv[0] is "config". Returns the exit status.
int config_main(int argc, char** argv);

}  // namespace phalanx::apps
