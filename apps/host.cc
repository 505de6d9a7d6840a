#include "apps/host.h"

#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <optional>
#include <sstream>

namespace phalanx::apps {
namespace {

std::optional<std::string> first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  if (!file || !std::getline(file, line)) return std::nullopt;
  return line;
}

std::optional<int64_t> number_in(const std::string& path) {
  const std::optional<std::string> line = first_line(path);
  if (!line || line->empty() || !std::isdigit(static_cast<unsigned char>((*line)[0])))
    return std::nullopt;  // absent, or "max"
  return std::stoll(*line);
}

int64_t mem_available() {
  std::ifstream file("/proc/meminfo");
  std::string key;
  int64_t kib = 0;
  std::string rest;
  while (file >> key >> kib && std::getline(file, rest))
    if (key == "MemAvailable:") return kib << 10;
  return 0;
}

// Folders of this process's cgroup, v2 first, each up to the root.
std::vector<std::string> cgroup_folders(const std::string& v1_controller) {
  std::vector<std::string> folders;
  std::ifstream file("/proc/self/cgroup");
  std::string line;
  while (std::getline(file, line)) {
    const size_t a = line.find(':');
    const size_t b = line.find(':', a + 1);
    if (a == std::string::npos || b == std::string::npos) continue;
    const std::string controllers = line.substr(a + 1, b - a - 1);
    std::string root;
    if (controllers.empty()) root = "/sys/fs/cgroup";
    else if (controllers.find(v1_controller) != std::string::npos)
      root = "/sys/fs/cgroup/" + v1_controller;
    else continue;
    std::string path = line.substr(b + 1);
    for (;;) {
      folders.push_back(root + (path == "/" ? "" : path));
      const size_t slash = path.rfind('/');
      if (path.size() <= 1 || slash == std::string::npos) break;
      path = slash == 0 ? "/" : path.substr(0, slash);
    }
  }
  return folders;
}

}  // namespace

int HostResources::usable_cores() const {
  int cores = std::max<int>(1, static_cast<int>(cpus.size()));
  if (cpu_quota > 0) cores = std::min(cores, std::max(1, static_cast<int>(std::ceil(cpu_quota - 0.01))));
  return cores;
}

HostResources host_resources() {
  HostResources host;
  host.memory_bytes = mem_available();
  host.memory_source = "MemAvailable";
  const std::array<std::pair<const char*, const char*>, 2> kFiles = {
      {{"/memory.max", "/memory.current"}, {"/memory.limit_in_bytes", "/memory.usage_in_bytes"}}};
  for (const std::string& folder : cgroup_folders("memory")) {
    for (const auto& [limit_file, usage_file] : kFiles) {
      const std::optional<int64_t> limit = number_in(folder + limit_file);
      if (!limit) continue;
      const int64_t left = std::max<int64_t>(0, *limit - number_in(folder + usage_file).value_or(0));
      if (left < host.memory_bytes) {
        host.memory_bytes = left;
        host.memory_source = folder + limit_file;
      }
    }
  }
  cpu_set_t set;
  CPU_ZERO(&set);
  if (::sched_getaffinity(0, sizeof set, &set) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) host.cpus.push_back(cpu);
  for (const std::string& folder : cgroup_folders("cpu")) {
    double quota = 0;
    double period = 0;
    if (const auto line = first_line(folder + "/cpu.max"); line && line->rfind("max", 0) != 0) {
      std::istringstream(*line) >> quota >> period;
    } else if (const auto us = number_in(folder + "/cpu.cfs_quota_us")) {
      quota = static_cast<double>(*us);
      period = static_cast<double>(number_in(folder + "/cpu.cfs_period_us").value_or(100000));
    }
    if (quota > 0 && period > 0 && (host.cpu_quota == 0 || quota / period < host.cpu_quota))
      host.cpu_quota = quota / period;
  }
  return host;
}

std::string format_bytes(int64_t bytes) {
  const double b = static_cast<double>(bytes);
  if (bytes >= int64_t{1} << 30) return fmt::format("{:.2f} GiB", b / (1 << 30));
  if (bytes >= 1 << 20) return fmt::format("{:.1f} MiB", b / (1 << 20));
  return fmt::format("{:.1f} KiB", b / 1024);
}

}  // namespace phalanx::apps
