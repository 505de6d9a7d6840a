#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace phalanx::apps {

// What this process may use of the machine.
struct HostResources {
  int64_t memory_bytes = 0;   // the smaller of MemAvailable and what is left of the cgroup's limit
  std::string memory_source;  // "MemAvailable" or the limit's file
  std::vector<int> cpus;      // of the affinity mask (cpuset included)
  double cpu_quota = 0;       // cores by the cgroup's quota; 0: none
  [[nodiscard]] int usable_cores() const;  // at least 1
};

[[nodiscard]] HostResources host_resources();

// "1.5 GiB"
[[nodiscard]] std::string format_bytes(int64_t bytes);

}  // namespace phalanx::apps
