#include "apps/config_environment.h"

#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <charconv>
#include <string_view>
#include <thread>

extern char** environ;  // NOLINT(readability-redundant-declaration)

namespace phalanx::apps {
namespace {

// Known, accepted, and without effect on CPUs or in this version.
constexpr auto kWithoutEffect = std::to_array<std::string_view>({
    "MASTER_ADDR",
    "LOCAL_WORLD_SIZE",
    "LCCL_DETERMINISTIC",
    "HCCL_EXEC_TIMEOUT",
    "HCCL_BUFFSIZE",
    "HCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "TP_SOCKET_IFNAME",
    "HCCL_IF_IP",
    "HCCL_RDMA_RETRY_CNT",
    "HCCL_RDMA_TIMEOUT",
    "HCCL_RDMA_TC",
    "HCCL_RDMA_SL",
    "HCCL_OP_EXPANSION_MODE",
    "HCCL_INTRA_PCIE_ENABLE",
    "HCCL_INTRA_ROCE_ENABLE",
    "ASCEND_RT_VISIBLE_DEVICES",
    "NPU_DEVICE_IDS",
    "LOCAL_CACHE_DIR",
    "MINDIE_LLM_BENCHMARK_ENABLE",
    "MINDIE_LLM_BENCHMARK_FILEPATH",
    "MINDIE_LLM_BENCHMARK_RESERVING_RATIO",
    "MIES_PROFILER_MODE",
    "MIES_MEMORY_DETECTOR_MODE",
    "MINDIE_LLM_RECOMPUTE_THRESHOLD",
    "MIES_USE_MB_SWAPPER",
    "POST_PROCESSING_SPEED_MODE_TYPE",
    "PERFORMANCE_PREFIX_TREE_ENABLE",
    "REMOVE_GENERATION_CONFIG_DICT",
    "EP_OPENSSL_PATH",
    "HSECEASY_PATH",
    "PYTORCH_NPU_ALLOC_CONF",
    "PYTORCH_INSTALL_PATH",
    "PYTORCH_NPU_INSTALL_PATH",
    "TASK_QUEUE_ENABLE",
    "INF_NAN_MODE_ENABLE",
    "ASCEND_SLOG_PRINT_TO_STDOUT",
    "ASCEND_GLOBAL_LOG_LEVEL",
    "ASCEND_GLOBAL_EVENT_ENABLE",
    "ASCEND_LAUNCH_BLOCKING",
    "ATB_LLM_TOKEN_IDS_SAVE_ENABLE",
    "ATB_LLM_TOKEN_IDS_SAVE_FOLDER",
    "BIND_CPU",
    "CPU_BINDING_NUM",
    "RESERVED_MEMORY_GB",
    "LONG_SEQ_ENABLE",
    "IS_ALIBI_MASK_FREE",
    "ATB_LLM_LCOC_ENABLE",
    "ATB_LLM_ENABLE_AUTO_TRANSPOSE",
    "ATB_LLM_RAZOR_ATTENTION_ENABLE",
    "ATB_LLM_RAZOR_ATTENTION_ROPE",
    "ATB_OPERATION_EXECUTE_ASYNC",
    "ATB_PROFILING_ENABLE",
    "ATB_USE_TILING_COPY_STREAM",
    "ATB_HOME_PATH",
    "ATB_WORKSPACE_MEM_ALLOC_GLOBAL",
    "ATB_WORKSPACE_MEM_ALLOC_ALG_TYPE",
    "ATB_OPSRUNNER_KERNEL_CACHE_GLOABL_COUNT",
    "ATB_OPSRUNNER_KERNEL_CACHE_LOCAL_COUNT",
    "ATB_MATMUL_SHUFFLE_K_ENABLE",
    "MINDIE_ACLNN_CACHE_GLOBAL_COUNT",
    "PROFILING_FILEPATH",
    "PROFILING_LEVEL",
    "MINDIE_ENABLE_EXPERT_HOTPOT_GATHER",
    "MINDIE_EXPERT_HOTPOT_DUMP_PATH",
    "DEEPSEEK_MTP",
    "DP_MOVE_UP_ENABLE",
    "DP_PARTITION_UP_ENABLE",
    "LM_HEAD_LOCAL_TP",
    "PYTHON_LOG_MAXSIZE",
});

struct Renamed {
  std::string_view old_name;
  std::string_view name;
};
constexpr auto kRenamed = std::to_array<Renamed>({
    {"OCK_LOG_TO_STDOUT", "MINDIE_LOG_TO_STDOUT"},
    {"MINDIE_LLM_PYTHON_LOG_TO_STDOUT", "MINDIE_LOG_TO_STDOUT"},
    {"MINDIE_LLM_LOG_TO_STDOUT", "MINDIE_LOG_TO_STDOUT"},
    {"ATB_LOG_TO_STDOUT", "MINDIE_LOG_TO_STDOUT"},
    {"MIES_PYTHON_LOG_TO_STDOUT", "MINDIE_LOG_TO_STDOUT"},
    {"OCK_LOG_LEVEL", "MINDIE_LOG_LEVEL"},
    {"MINDIE_LLM_PYTHON_LOG_LEVEL", "MINDIE_LOG_LEVEL"},
    {"MINDIE_LLM_LOG_LEVEL", "MINDIE_LOG_LEVEL"},
    {"ATB_LOG_LEVEL", "MINDIE_LOG_LEVEL"},
    {"LOG_LEVEL", "MINDIE_LOG_LEVEL"},
    {"MIES_PYTHON_LOG_LEVEL", "MINDIE_LOG_LEVEL"},
    {"MINDIE_LLM_PYTHON_LOG_MAXNUM", "MINDIE_LOG_ROTATE"},
    {"MINDIE_LLM_PYTHON_LOG_MAXSIZE", "MINDIE_LOG_ROTATE"},
    {"MIES_PYTHON_LOG_PATH", "MINDIE_LOG_PATH"},
    {"MINDIE_LLM_PYTHON_LOG_PATH", "MINDIE_LOG_PATH"},
    {"MINDIE_LLM_PYTHON_LOG_TO_FILE", "MINDIE_LOG_TO_FILE"},
    {"MINDIE_LLM_LOG_TO_FILE", "MINDIE_LOG_TO_FILE"},
    {"ATB_LOG_TO_FILE", "MINDIE_LOG_TO_FILE"},
    {"LOG_TO_FILE", "MINDIE_LOG_TO_FILE"},
    {"MIES_PYTHON_LOG_TO_FILE", "MINDIE_LOG_TO_FILE"},
});

// The whole of `text` as a number; false if anything is left over.
template <typename Number>
bool parse_number(std::string_view text, Number& number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc() && end == text.data() + text.size();
}

void bad_variable(Problems& problems, std::string_view name, std::string_view value,
                  std::string_view expected, std::string_view fix) {
  problems.add({.what = "bad value",
                .where = fmt::format("environment variable {}", name),
                .found = fmt::format("\"{}\"", value),
                .expected = std::string(expected),
                .fix = std::string(fix)});
}

void read_data_ports(const std::string& text, NodeConfig& config, Problems& problems) {
  const size_t dash = text.find('-');
  int begin = 0;
  int end = 0;
  const bool good = dash != std::string::npos &&
                    parse_number(std::string_view(text).substr(0, dash), begin) &&
                    parse_number(std::string_view(text).substr(dash + 1), end) && begin >= 1024 &&
                    end <= 65535 && begin <= end;
  if (!good) {
    bad_variable(problems, "PHALANX_DATA_PORTS", text,
                 "first-last, both in [1024, 65535], first no greater than last",
                 "e.g. PHALANX_DATA_PORTS=20000-20063");
    return;
  }
  config.data_port_begin = begin;
  config.data_port_end = end;
}

void read_threads(const Environment& environment, NodeConfig& config, Problems& problems) {
  for (const char* name : {"PHALANX_THREADS", "OMP_NUM_THREADS"}) {
    const std::string text = variable(environment, name);
    if (text.empty()) continue;
    int threads = 0;
    if (!parse_number(text, threads) || threads < 1 || threads > 1024) {
      bad_variable(problems, name, text, "an integer in [1, 1024]",
                   fmt::format("unset {} to use all cores of the node", name));
      return;
    }
    config.threads_per_rank = threads;
    if (threads == 1 && std::string_view(name) == "OMP_NUM_THREADS" &&
        std::thread::hardware_concurrency() > 2)
      config.warnings.push_back(
          "environment variable OMP_NUM_THREADS: found 1: every rank computes on one core only; "
          "unset it, or set PHALANX_THREADS, to use more");
    return;
  }
}

}  // namespace

Environment process_environment() {
  Environment result;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view line = *entry;
    const size_t equals = line.find('=');
    if (equals != std::string_view::npos)
      result.emplace(line.substr(0, equals), line.substr(equals + 1));
  }
  return result;
}

std::string variable(const Environment& environment, const std::string& name) {
  const auto it = environment.find(name);
  return it == environment.end() ? std::string() : it->second;
}

void read_memory_speed(const Environment& environment, NodeConfig& config, Problems& problems) {
  const std::string text = variable(environment, "PHALANX_MEMORY_GBPS");
  if (text.empty()) return;
  double speed = 0;
  if (parse_number(text, speed) && speed > 0 && speed <= 1e5)
    config.memory_gbps = speed;
  else
    bad_variable(problems, "PHALANX_MEMORY_GBPS", text, "GB/s, above 0 and at most 100000",
                 "unset it to have the memory bandwidth measured");
}

void read_environment(const Environment& environment, NodeConfig& config, Problems& problems) {
  if (const std::string text = variable(environment, "NPU_MEMORY_FRACTION"); !text.empty()) {
    double fraction = 0;
    if (parse_number(text, fraction) && fraction > 0 && fraction <= 1)
      config.npu_memory_fraction = fraction;
    else
      bad_variable(problems, "NPU_MEMORY_FRACTION", text, "a number above 0 and at most 1",
                   "e.g. NPU_MEMORY_FRACTION=0.8");
  }
  if (const std::string text = variable(environment, "HCCL_CONNECT_TIMEOUT"); !text.empty()) {
    double seconds = 0;
    if (parse_number(text, seconds) && seconds >= 1 && seconds <= 1e9)
      config.connect_timeout_s = seconds;
    else
      bad_variable(problems, "HCCL_CONNECT_TIMEOUT", text, "seconds, at least 1",
                   "e.g. HCCL_CONNECT_TIMEOUT=3600, or unset it to wait without limit");
  }
  if (const std::string text = variable(environment, "PHALANX_DATA_PORTS"); !text.empty())
    read_data_ports(text, config, problems);
  read_threads(environment, config, problems);
  read_memory_speed(environment, config, problems);
  config.cpus = variable(environment, "PHALANX_CPUS");
  config.data_plane = variable(environment, "PHALANX_DATA_PLANE");

  const std::string save = variable(environment, "ATB_LLM_LOGITS_SAVE_ENABLE");
  if (!save.empty() && save != "0") {
    config.logits_folder = variable(environment, "ATB_LLM_LOGITS_SAVE_FOLDER");
    if (config.logits_folder.empty())
      bad_variable(problems, "ATB_LLM_LOGITS_SAVE_FOLDER", "",
                   "a directory, since "
                   "ATB_LLM_LOGITS_SAVE_ENABLE is set",
                   "name a directory or unset the other");
  }

  for (const std::string_view name : kWithoutEffect)
    if (!variable(environment, std::string(name)).empty())
      config.ignored.push_back(fmt::format("environment variable {}", name));
  for (const auto& [old_name, name] : kRenamed)
    if (!variable(environment, std::string(old_name)).empty())
      config.warnings.push_back(
          variable(environment, std::string(name)).empty()
              ? fmt::format("environment variable {} is the old name of {}; set that one instead",
                            old_name, name)
              : fmt::format("environment variable {} is the old name of {}, which is set and wins",
                            old_name, name));
  if (config.backend.multi_nodes)
    for (const char* name : {"http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"})
      if (!variable(environment, name).empty())
        config.warnings.push_back(fmt::format(
            "environment variable {} is set: nodes reach each other directly and do not use it",
            name));
}

std::string rank_table_path(const Environment& environment, NodeConfig& config) {
  std::string path = variable(environment, "RANK_TABLE_FILE");
  const std::string old_path = variable(environment, "RANKTABLEFILE");
  if (!path.empty() || old_path.empty()) return path;
  config.warnings.push_back(
      "environment variable RANKTABLEFILE is the old name of RANK_TABLE_FILE; accepted, but set "
      "the new one");
  return old_path;
}

}  // namespace phalanx::apps
