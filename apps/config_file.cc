#include "apps/config_file.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>

#include "apps/config_adapters.h"
#include "apps/config_plugins.h"
#include "apps/config_section.h"
#include "apps/config_security.h"
#include "phalanx/base/json.h"
#include "phalanx/models/kv_format.h"
#include "phalanx/net/address.h"
#include "phalanx/text/tool_calls.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

constexpr IntegerRange kPort{1024, 65535};
constexpr size_t kLongestPath = 4096;
constexpr std::string_view kNotYet = "not supported by this version";

// Everything the section readers share.
struct Reading {
  const std::string& file;
  NodeConfig& config;
  ParallelRequest& parallel;
  Problems& problems;

  [[nodiscard]] ConfigSection section(const json& object, std::string path) const {
    return {object, file, std::move(path), problems, config.ignored};
  }
};

void path_key(ConfigSection& section, std::string_view key, Need need, std::string& target) {
  if (section.string(key, need, target) && target.size() > kLongestPath)
    section.problem(key, "path too long", fmt::format("{} bytes", target.size()),
                    fmt::format("at most {} bytes", kLongestPath), "use a shorter path");
}

void ip_key(ConfigSection& section, std::string_view key, Need need, std::string& target) {
  if (!section.string(key, need, target)) return;
  if (!is_ip(target))
    section.problem(key, "not an IP address", fmt::format("\"{}\"", target),
                    "an IPv4 or IPv6 address in numbers",
                    fmt::format("e.g. \"{}\": \"127.0.0.1\"", key));
}

void read_server(const json& object, Reading& reading) {
  ServerConfig& server = reading.config.server;
  ConfigSection section = reading.section(object, "ServerConfig");
  ip_key(section, "ipAddress", Need::kMandatory, server.ip_address);
  server.management_ip_address = server.ip_address;
  ip_key(section, "managementIpAddress", Need::kOptional, server.management_ip_address);
  section.integer("port", Need::kMandatory, kPort, server.port);
  if (!section.integer("managementPort", Need::kOptional, kPort, server.management_port))
    server.management_port = server.port;
  section.integer("metricsPort", Need::kOptional, kPort, server.metrics_port);
  section.boolean("allowAllZeroIpListening", Need::kMandatory, server.allow_all_zero_ip);
  section.integer("maxLinkNum", Need::kMandatory, {1, 4096}, server.max_link_num);
  section.integer("maxRequestLength", Need::kOptional, {1, 100}, server.max_request_mb);
  section.integer("maxJsonDepth", Need::kOptional, {10, 100}, server.max_json_depth);
  section.boolean("fullTextEnabled", Need::kOptional, server.full_text);
  if (section.string("openAiSupport", Need::kOptional, server.open_ai_support) &&
      server.open_ai_support != "vllm")
    section.list_ignored("openAiSupport", "the vllm flavour is served");
  int seconds = 600;
  if (section.integer("tokenTimeout", Need::kMandatory, {1, 3600}, seconds))
    server.token_timeout_s = seconds;
  seconds = 600;
  if (section.integer("e2eTimeout", Need::kMandatory, {1, 65535}, seconds))
    server.e2e_timeout_s = seconds;

  std::string mode = "standard";
  if (section.string("inferMode", Need::kMandatory, mode)) {
    if (mode == "dmi")
      section.problem("inferMode", "prefill/decode disaggregation is not supported", "\"dmi\"",
                      "\"standard\"", "write \"inferMode\": \"standard\"");
    else if (mode != "standard")
      section.problem("inferMode", "unknown mode", fmt::format("\"{}\"", mode), "\"standard\"",
                      "write \"inferMode\": \"standard\"");
  }

  section.boolean("httpsEnabled", Need::kMandatory, server.https);
  read_plane_tls(section, reading.config.home, server);

  if (const json* health = section.object("HealthCheckConfig", Need::kOptional)) {
    ConfigSection inner = reading.section(*health, "ServerConfig.HealthCheckConfig");
    int threshold = 0;
    if (inner.integer("npuUsageThreshold", Need::kOptional, {0, 100}, threshold) && threshold > 0)
      inner.list_ignored("npuUsageThreshold", "");
    inner.finish();
  }
  int inter_port = 1121;
  section.integer("interCommPort", Need::kOptional, kPort, inter_port);
  section.without_effect({"distDPServerEnabled", "interCommTLSEnabled", "interCommPort",
                          "interCommTlsCaPath", "interCommTlsCaFiles", "interCommTlsCert",
                          "interCommPk", "interCommPkPwd", "interCommTlsCrlPath",
                          "interCommTlsCrlFiles", "layerwiseDisaggregated",
                          "layerwiseDisaggregatedRoleType", "layerwiseDisaggregatedMasterIpAddress",
                          "layerwiseDisaggregatedSlaveIpAddress", "layerwiseDisaggregatedDataPort",
                          "layerwiseDisaggregatedCrtlPort"});
  section.finish();
}

// One of the parallel degrees of which this version knows only "off". -1 and 1 mean off.
void only_off(ConfigSection& section, std::string_view key, std::string_view name) {
  int64_t degree = -1;
  if (!section.integer(key, Need::kOptional, {INT32_MIN, INT32_MAX}, degree)) return;
  if (degree != -1 && degree != 1)
    section.problem(key, fmt::format("{} parallelism is {}", name, kNotYet), std::to_string(degree),
                    "1, or no such key",
                    fmt::format("remove \"{}\": the model is then cut over all ranks by tensor "
                                "parallelism",
                                key));
}

// How the texts of this family are taken apart into calls and reasoning.
void read_output_parsing(ConfigSection& family, Reading& reading, const std::string& path,
                         ModelConfig& model) {
  family.boolean("enable_reasoning", Need::kOptional, model.enable_reasoning);
  std::string parser;
  family.string("tool_call_parser", Need::kOptional, parser);
  if (const json* options = family.object("tool_call_options", Need::kOptional)) {
    ConfigSection inner = reading.section(*options, path + ".tool_call_options");
    inner.string("tool_call_parser", Need::kOptional, parser);
    inner.finish();
  }
  if (parser.empty()) return;
  if (text::call_format(parser)) {
    model.tool_call_parser = parser;
    return;
  }
  reading.config.warnings.push_back(
      fmt::format("{}: tool_call_parser \"{}\" is not known, so the family's own is used; known: {}",
                  path, parser, fmt::join(text::call_format_names(), ", ")));
}

void read_model_entry(const json& object, Reading& reading) {
  ModelConfig& model = reading.config.model;
  const std::string path = "BackendConfig.ModelDeployConfig.ModelConfig[0]";
  ConfigSection section = reading.section(object, path);
  std::string type = "Standard";
  if (section.string("modelInstanceType", Need::kOptional, type) && type != "Standard")
    section.problem("modelInstanceType",
                    type == "StandardMock" || type == "TargetModel" || type == "AssistantModel"
                        ? fmt::format("this instance type is {}", kNotYet)
                        : "unknown instance type",
                    fmt::format("\"{}\"", type), "\"Standard\"",
                    "write \"modelInstanceType\": \"Standard\"");
  if (section.string("modelName", Need::kMandatory, model.name) && !is_model_name(model.name))
    section.problem("modelName", "not a model name", fmt::format("\"{}\"", model.name),
                    "1 to 256 of letters, digits, '_', '.', '-', the first and the last a letter "
                    "or digit",
                    "choose such a name; clients send it as \"model\"");
  path_key(section, "modelWeightPath", Need::kMandatory, model.weight_path);
  section.integer("worldSize", Need::kMandatory, {1, UINT32_MAX}, model.world_size);
  if (section.integer("cpuMemSize", Need::kMandatory, {0, UINT32_MAX}, model.cpu_mem_gb) &&
      model.cpu_mem_gb > 0)
    section.list_ignored("cpuMemSize", "preempted sequences are computed again, not swapped");
  if (section.integer("npuMemSize", Need::kMandatory, {-1, UINT32_MAX}, model.npu_mem_gb) &&
      model.npu_mem_gb == 0) {
    section.problem("npuMemSize", "value out of range", "0", "-1 (automatic) or at least 1",
                    "write \"npuMemSize\": -1");
    model.npu_mem_gb = -1;
  }
  std::string backend = "atb";
  if (section.string("backendType", Need::kMandatory, backend) && backend != "atb" &&
      backend != "torch" && backend != "ms")
    section.problem("backendType", "unknown backend", fmt::format("\"{}\"", backend),
                    "\"atb\", \"torch\" or \"ms\" (all the same here)",
                    "write \"backendType\": \"atb\"");
  bool trust = false;
  if (section.boolean("trustRemoteCode", Need::kOptional, trust) && trust)
    reading.config.warnings.push_back(
        fmt::format("{}: true has no effect: code in a model directory is never executed",
                    section.where("trustRemoteCode")));

  const auto degree = [&](std::string_view key, std::string_view expected,
                          std::optional<int64_t>& target) {
    int64_t value = -1;
    if (!section.integer(key, Need::kOptional, {INT32_MIN, INT32_MAX}, value) || value == -1) return;
    if (value < 1)
      section.problem(key, "value out of range", std::to_string(value),
                      fmt::format("{}, or no such key", expected),
                      fmt::format("remove \"{}\"", key));
    else
      target = value;
  };
  degree("tp", "the number of all ranks", reading.parallel.tp);
  degree("moe_ep", "the number of runs of ranks that hold whole experts", reading.parallel.moe_ep);
  degree("moe_tp", "the number of ranks that share an expert", reading.parallel.moe_tp);
  only_off(section, "dp", "data");
  only_off(section, "cp", "context");
  only_off(section, "sp", "sequence");
  only_off(section, "pp", "pipeline");
  std::string kv = "auto";
  if (section.string("kvCacheDtype", Need::kOptional, kv)) {
    if (const auto choice = models::kv_dtype_of(kv))
      model.kv = *choice;
    else
      section.problem("kvCacheDtype", "unknown type of the KV cache", fmt::format("\"{}\"", kv),
                      std::string(models::kKvDtypeNames),
                      "write \"kvCacheDtype\": \"auto\", or no such key");
  }
  if (const json* plugins = section.any("plugin_params"))
    read_plugin_params(*plugins, section.where("plugin_params"), reading.problems,
                       reading.config.ignored, reading.config.plugins);
  section.without_effect({"microbatch_size", "speculationGamma",
                          "async_scheduler_wait_time", "kv_trans_timeout", "kv_link_timeout",
                          "ignore_eos"});

  if (const json* models = section.object("models", Need::kOptional)) {
    for (const auto& family : models->items()) {
      const std::string family_path = fmt::format("{}.models.{}", path, family.key());
      if (!family.value().is_object()) {
        reading.problems.add({.what = "wrong type",
                              .where = fmt::format("{}: {}", reading.file, family_path),
                              .found = family.value().type_name(),
                              .expected = "an object",
                              .fix = "write {...} or remove it"});
        continue;
      }
      ConfigSection inner = reading.section(family.value(), family_path);
      std::string chat_template;
      if (inner.string("chat_template", Need::kOptional, chat_template) && !chat_template.empty())
        model.chat_template = chat_template;
      read_output_parsing(inner, reading, family_path, model);
      for (const auto& key : family.value().items())
        if (key.key() != "chat_template" && key.key() != "enable_reasoning" &&
            key.key() != "tool_call_options" && key.key() != "tool_call_parser")
          inner.without_effect({key.key()});
    }
  }
  section.finish();
}

void read_model_deploy(const json& object, Reading& reading) {
  ModelConfig& model = reading.config.model;
  ConfigSection section = reading.section(object, "BackendConfig.ModelDeployConfig");
  section.integer("maxSeqLen", Need::kMandatory, {1, UINT32_MAX}, model.max_sequence);
  section.integer("maxInputTokenLen", Need::kMandatory, {1, 4194304}, model.max_input_tokens);
  if (const json* truncation = section.any("truncation")) {
    if (truncation->is_boolean()) {
      model.truncation = truncation->get<bool>() ? -1 : 0;
    } else if (truncation->is_number_integer()) {
      section.integer("truncation", Need::kOptional, {-1, 1}, model.truncation);
    } else {
      reading.config.warnings.push_back(
          fmt::format("{}: found {}, expected -1, 0, 1, true or false; taken as 0 (a prompt that "
                      "is too long is refused)",
                      section.where("truncation"), truncation->type_name()));
    }
  }
  section.without_effect({"speculationGamma"});
  if (const json* models = section.array("ModelConfig", Need::kMandatory)) {
    if (models->size() != 1)
      section.problem("ModelConfig", "wrong number of entries",
                      fmt::format("{} entries", models->size()), "exactly 1",
                      "keep one model; start another instance for another model");
    if (!models->empty()) {
      if (models->front().is_object())
        read_model_entry(models->front(), reading);
      else
        section.problem("ModelConfig[0]", "wrong type", models->front().type_name(), "an object",
                        "write {...}");
    }
  }
  read_adapter_keys(section, model);
  section.finish();
}

void read_schedule(const json& object, Reading& reading) {
  ScheduleConfig& schedule = reading.config.schedule;
  ConfigSection section = reading.section(object, "BackendConfig.ScheduleConfig");
  std::string text = "Standard";
  bool mix = false;
  if (section.string("templateType", Need::kMandatory, text)) {
    mix = text == "Mix";
    if (mix)
      section.list_ignored("templateType", "prefill and decode share a step in any case");
    else if (text != "Standard")
      section.problem("templateType", "unknown template", fmt::format("\"{}\"", text),
                      "\"Standard\" or \"Mix\"", "write \"templateType\": \"Standard\"");
  }
  text = "Standard_LLM";
  if (section.string("templateName", Need::kMandatory, text) && text != "Standard_LLM")
    section.problem("templateName", "unknown template", fmt::format("\"{}\"", text),
                    "\"Standard_LLM\"", "write \"templateName\": \"Standard_LLM\"");
  section.integer("cacheBlockSize", Need::kMandatory, {1, 128}, schedule.cache_block_size);
  section.integer("maxBatchSize", Need::kMandatory, {1, 819200}, schedule.max_batch);
  schedule.max_prefill_batch = std::min<int64_t>(50, schedule.max_batch);
  section.integer("maxPrefillBatchSize", Need::kMandatory, {0, schedule.max_batch},
                  schedule.max_prefill_batch);
  if (schedule.max_prefill_batch == 0) schedule.max_prefill_batch = schedule.max_batch;
  const bool tokens = section.integer("maxPrefillTokens", Need::kMandatory, {1, 4194304},
                                      schedule.max_prefill_tokens);
  const int64_t input = reading.config.model.max_input_tokens;
  if (tokens && !mix && schedule.max_prefill_tokens < input)
    section.problem("maxPrefillTokens", "smaller than maxInputTokenLen",
                    std::to_string(schedule.max_prefill_tokens), fmt::format("at least {}", input),
                    fmt::format("raise maxPrefillTokens to {} or lower "
                                "ModelDeployConfig.maxInputTokenLen",
                                input));
  section.integer("maxIterTimes", Need::kMandatory, {1, UINT32_MAX}, schedule.max_output_tokens);
  section.integer("maxPreemptCount", Need::kMandatory, {0, schedule.max_batch},
                  schedule.max_preempt_count);
  section.integer("maxQueueDelayMicroseconds", Need::kMandatory, {500, 1000000},
                  schedule.max_queue_delay_us);
  schedule.max_n = std::min<int64_t>(128, schedule.max_batch);
  section.integer("maxN", Need::kOptional, {1, std::min<int64_t>(8192, schedule.max_batch)},
                  schedule.max_n);

  int64_t number = 150;
  section.integer("prefillTimeMsPerReq", Need::kMandatory, {0, 1000}, number);
  number = 50;
  section.integer("decodeTimeMsPerReq", Need::kMandatory, {0, 1000}, number);
  for (const std::string_view key : {"prefillPolicyType", "decodePolicyType"}) {
    number = 0;
    if (section.integer(key, Need::kMandatory, {0, 3}, number) && number != 0)
      section.list_ignored(key, "first come, first served");
  }
  bool flag = false;
  if (section.boolean("supportSelectBatch", Need::kMandatory, flag) && flag)
    section.list_ignored("supportSelectBatch", "prefill and decode share a step in any case");
  number = 2500;
  if (section.integer("maxFirstTokenWaitTime", Need::kOptional, {0, 3600000}, number) &&
      schedule.max_preempt_count > 0)
    section.list_ignored("maxFirstTokenWaitTime", "");
  section.without_effect(
      {"stageSelectPolicy", "dynamicBatchSizeEnable", "prefillExpectedTime", "decodeExpectedTime",
       "policyType", "prefillChunkSize", "maxNumPartialPrefills", "maxLongPartialPrefills",
       "longPrefillTokenThreshold", "splitType", "splitStartType", "splitChunkTokens",
       "splitStartBatchSize", "enableSplit", "enablePrefixCache", "enablChunkedPrefill",
       "bufferResponseEnabled", "distributedEnable", "layerwiseDisaggregated"});
  section.finish();
}

void check_device_ids(ConfigSection& section, int64_t instances, Reading& reading) {
  const NodeConfig& config = reading.config;
  std::string complaint;
  if (std::cmp_not_equal(config.backend.device_ids.size(), instances)) {
    complaint = fmt::format("{} inner arrays for modelInstanceNumber {}",
                            config.backend.device_ids.size(), instances);
  } else {
    for (const std::vector<int>& ids : config.backend.device_ids) {
      if (std::cmp_not_equal(ids.size(), config.model.world_size))
        complaint = fmt::format("{} ids for worldSize {}", ids.size(), config.model.world_size);
      else if (std::set<int>(ids.begin(), ids.end()).size() != ids.size())
        complaint = fmt::format("a repeated id in [{}]", fmt::join(ids, ","));
    }
  }
  if (complaint.empty()) return;
  if (config.backend.multi_nodes) {
    reading.config.warnings.push_back(
        fmt::format("{}: found {}; it does not matter, since the rank table decides when "
                    "multiNodesInferEnabled is true",
                    section.where("npuDeviceIds"), complaint));
    return;
  }
  std::string ids;
  for (int64_t i = 0; i < std::min<int64_t>(config.model.world_size, 8); ++i)
    ids += fmt::format("{}{}", i == 0 ? "" : ",", i);
  if (config.model.world_size > 8) ids += ",...";
  section.problem("npuDeviceIds", "does not fit worldSize", complaint,
                  "one inner array of worldSize different ids",
                  fmt::format("write \"npuDeviceIds\": [[{}]]", ids));
}

void read_backend(const json& object, Reading& reading) {
  NodeConfig& config = reading.config;
  BackendConfig& backend = config.backend;
  ConfigSection section = reading.section(object, "BackendConfig");
  std::string name = "mindieservice_llm_engine";
  if (section.string("backendName", Need::kMandatory, name) &&
      (name.size() > 50 || !std::regex_match(name, std::regex("[a-z]+(_[a-z]+)*"))))
    section.problem("backendName", "not a backend name", fmt::format("\"{}\"", name.substr(0, 60)),
                    "at most 50 of small letters, joined by single '_'",
                    "write \"backendName\": \"mindieservice_llm_engine\"");
  int64_t instances = 1;
  if (section.integer("modelInstanceNumber", Need::kMandatory, {1, 10}, instances) &&
      instances != 1)
    section.problem("modelInstanceNumber", fmt::format("several instances are {}", kNotYet),
                    std::to_string(instances), "1",
                    "write \"modelInstanceNumber\": 1 and start one server per instance, each with "
                    "its own ports");
  section.integer("tokenizerProcessNumber", Need::kMandatory, {1, 32}, backend.tokenizer_threads);
  section.boolean("multiNodesInferEnabled", Need::kOptional, backend.multi_nodes);
  section.integer("multiNodesInferPort", Need::kOptional, kPort, backend.multi_nodes_port);
  bool tls = true;
  if (section.boolean("interNodeTLSEnabled", Need::kOptional, tls)) backend.inter_node_tls = tls;
  read_inter_node_keys(section, backend.inter_node_keys);
  const bool ids = section.device_ids("npuDeviceIds", Need::kMandatory, backend.device_ids);
  section.without_effect({"kvPoolConfig", "layerwiseDisaggregated"});
  if (const json* deploy = section.object("ModelDeployConfig", Need::kMandatory))
    read_model_deploy(*deploy, reading);
  if (ids) check_device_ids(section, 1, reading);
  if (const json* schedule = section.object("ScheduleConfig", Need::kMandatory))
    read_schedule(*schedule, reading);
  section.finish();

  for (const auto& [key, port] : {std::pair{"port", config.server.port},
                                  std::pair{"managementPort", config.server.management_port},
                                  std::pair{"metricsPort", config.server.metrics_port}}) {
    // "port" is compared even where no node port opens, as documented.
    if (port != backend.multi_nodes_port) continue;
    if (!backend.multi_nodes && std::string_view(key) != "port") continue;
    section.problem("multiNodesInferPort", fmt::format("the same as ServerConfig.{}", key),
                    std::to_string(port), "a port of its own",
                    fmt::format("change one of the two, e.g. \"multiNodesInferPort\": {}",
                                port == 1120 ? 1119 : 1120));
  }
}

}  // namespace

bool is_model_name(const std::string& name) {
  static const std::regex kPattern("[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,254}[a-zA-Z0-9])?");
  return name.size() <= 256 && std::regex_match(name, kPattern);
}

bool is_ip(const std::string& address) { return net::Address::parse(address).has_value(); }

void read_config_text(const std::string& text, const std::string& file, NodeConfig& config,
                      ParallelRequest& parallel, Problems& problems) {
  json root;
  try {
    root = parse_json(text, file);
  } catch (const Error& error) {
    problems.add({.what = error.what(), .fix = "correct the JSON at that place"});
    return;
  }
  if (!root.is_object()) {
    problems.add({.what = "wrong type",
                  .where = file,
                  .found = root.type_name(),
                  .expected = "a JSON object",
                  .fix = "write {...}"});
    return;
  }
  Reading reading{file, config, parallel, problems};
  ConfigSection section = reading.section(root, "");
  std::string version = "1.0.0";
  section.string("Version", Need::kOptional, version);
  if (const json* server = section.object("ServerConfig", Need::kMandatory))
    read_server(*server, reading);
  if (const json* backend = section.object("BackendConfig", Need::kMandatory))
    read_backend(*backend, reading);
  (void)section.any("LogConfig");  // ConfigWatch reads it, again and again
  section.without_effect({"EnableDynamicAdjustTimeoutConfig"});
  section.finish();
}

}  // namespace phalanx::apps
