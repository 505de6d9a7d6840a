#include "apps/config.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "apps/config_log.h"
#include "apps/config_make.h"

namespace phalanx::apps {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr char kTwoServers[] = R"({"version":"1.0","server_count":"2","server_list":[
 {"server_id":"127.0.0.1","container_ip":"127.0.0.1",
  "device":[{"device_id":"0","device_ip":"127.0.0.1","rank_id":"0"}]},
 {"server_id":"127.0.0.2","container_ip":"127.0.0.2",
  "device":[{"device_id":"0","device_ip":"127.0.0.2","rank_id":"1"}]}],"status":"completed"})";

// A weight directory, a config.json that starts, and the means to spoil them.
class ConfigTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() /
              fmt::format("config_test.{}.{}", ::getpid(),
                          ::testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(folder_);
    fs::create_directories(folder_ / "weights");
    ::chmod((folder_ / "weights").c_str(), 0750);
    write("weights/config.json",
          R"({"model_type":"llama","num_attention_heads":9,"max_position_embeddings":4096})");
    config_ =
        json::parse(make_config_json({.model = (folder_ / "weights").string(), .name = "demo"}));
    environment_ = {{"MINDIE_LLM_HOME_PATH", folder_.string()}};
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string write(const std::string& name, const std::string& text, mode_t mode = 0640) {
    const fs::path path = folder_ / name;
    fs::create_directories(path.parent_path());
    std::ofstream(path) << text;
    ::chmod(path.c_str(), mode);
    return path.string();
  }

  json& server() { return config_["ServerConfig"]; }
  json& backend() { return config_["BackendConfig"]; }
  json& deploy() { return backend()["ModelDeployConfig"]; }
  json& model() { return deploy()["ModelConfig"][0]; }
  json& schedule() { return backend()["ScheduleConfig"]; }

  void make_multi_node() {
    backend()["multiNodesInferEnabled"] = true;
    environment_["RANK_TABLE_FILE"] = write("ranktable.json", kTwoServers);
    environment_["MIES_CONTAINER_IP"] = "127.0.0.2";
  }

  NodeConfig load() {
    arguments_.config_file = write("conf/config.json", config_.dump(2));
    return load_node_config(arguments_, environment_);
  }
  // The message of a refused start; empty if it was not refused.
  std::string refusal() {
    try {
      (void)load();
      return {};
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::kInvalidArgument);
      return error.what();
    }
  }

  fs::path folder_;
  json config_;
  Environment environment_;
  ServeArguments arguments_;
};

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::string joined(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

TEST_F(ConfigTest, GeneratedFileStartsWithoutAWarning) {
  const NodeConfig config = load();
  EXPECT_EQ(joined(config.ignored), "");
  EXPECT_EQ(joined(config.warnings), "");
  EXPECT_EQ(config.model.name, "demo");
  EXPECT_EQ(config.server.port, 1025);
  EXPECT_EQ(config.table.world_size, 1);
  EXPECT_EQ(config.table.servers.size(), 1u);
  EXPECT_EQ(config.schedule.max_batch, 200);
  EXPECT_FALSE(config.server.https);
  EXPECT_FALSE(config.digest.empty());
}

// Every key of the documented file, those without effect and those for disaggregation included.
TEST_F(ConfigTest, FullDocumentedFileStarts) {
  server().update(json::parse(R"({"fullTextEnabled":false,"distDPServerEnabled":false,
    "interCommTLSEnabled":true,"interCommPort":1121,"interCommTlsCaPath":"security/grpc/ca/",
    "interCommTlsCaFiles":["ca.pem"],"interCommTlsCert":"security/grpc/certs/server.pem",
    "interCommPk":"security/grpc/keys/server.key.pem","interCommTlsCrlPath":"x",
    "interCommTlsCrlFiles":["server_crl.pem"],"tlsPkPwd":"security/pass/key_pwd.txt",
    "kmcKsfMaster":"tools/pmt/master/ksfa","kmcKsfStandby":"tools/pmt/standby/ksfb",
    "HealthCheckConfig":{"npuUsageThreshold":10}})"));
  backend().update(json::parse(R"({"kvPoolConfig":{"backend":"","configPath":""},
    "interNodeTlsPkPwd":"security/grpc/pass/mindie_server_key_pwd.txt",
    "interNodeKmcKsfMaster":"tools/pmt/master/ksfa","interNodeKmcKsfStandby":"x"})"));
  model().update(json::parse(R"({"dp":-1,"tp":-1,"plugin_params":"{\"plugin_type\":\"prefix_cache,la\",\"level\":6,\"window\":3}","some_sampling_key":3,
    "models":{"llama":{"chat_template":"{{x}}","enable_reasoning":true,"ep_level":1,
      "tool_call_options":{"tool_call_parser":"hermes"}}}})"));
  schedule().update(json::parse(R"({"stageSelectPolicy":0,"enablePrefixCache":false,
    "maxFirstTokenWaitTime":2500})"));
  config_["LogConfig"] = {{"dynamicLogLevel", ""}};
  config_["EnableDynamicAdjustTimeoutConfig"] = false;
  environment_["HCCL_OP_EXPANSION_MODE"] = "AIV";
  const NodeConfig config = load();
  const std::string ignored = joined(config.ignored);
  for (const char* key :
       {"ServerConfig.interCommPort\n", "ServerConfig.HealthCheckConfig.npuUsageThreshold\n",
        "BackendConfig.kvPoolConfig\n", "plugin_params.window\n",
        "ModelConfig[0].some_sampling_key (unknown key)\n",
        "ModelConfig[0].models.llama.ep_level\n", "ScheduleConfig.stageSelectPolicy\n",
        "environment variable HCCL_OP_EXPANSION_MODE\n"})
    EXPECT_TRUE(contains(ignored, key)) << key << " not in\n" << ignored;
  EXPECT_FALSE(contains(ignored, "tlsPkPwd"));
  EXPECT_EQ(config.model.chat_template, "{{x}}");
  EXPECT_EQ(config.model.tool_call_parser, "hermes");
  EXPECT_TRUE(config.model.enable_reasoning);
}

TEST_F(ConfigTest, AnUnknownToolCallParserIsWarnedOf) {
  model().update(json::parse(R"({"models":{"llama":{"tool_call_parser":"gpt"}}})"));
  const NodeConfig config = load();
  EXPECT_EQ(config.model.tool_call_parser, "");
  EXPECT_TRUE(contains(joined(config.warnings), "tool_call_parser \"gpt\" is not known"));
}

struct Change {
  const char* pointer;
  const char* value;  // JSON; empty removes the key
};

struct Mistake {
  const char* name;
  std::vector<Change> plant;
  std::vector<const char*> message;  // all of these, on one line
};

void PrintTo(const Mistake& mistake, std::ostream* out) { *out << mistake.name; }

void plant(const Mistake& mistake, json& config) {
  for (const Change& change : mistake.plant) {
    const json::json_pointer pointer(change.pointer);
    if (*change.value == '\0')
      config[pointer.parent_pointer()].erase(pointer.back());
    else
      config[pointer] = json::parse(change.value);
  }
}

const std::vector<Mistake>& mistakes() {
  static const std::vector<Mistake> kMistakes = {
      {"missing_section",
       {{"/ServerConfig", ""}},
       {"ServerConfig: missing key", "expected an object"}},
      {"missing_port",
       {{"/ServerConfig/port", ""}},
       {"ServerConfig.port: missing key", "[1024, 65535]", "add \"port\": 1025"}},
      {"port_as_text",
       {{"/ServerConfig/port", "\"1025\""}},
       {"ServerConfig.port: wrong type", "string \"1025\"", "write \"port\": 1025"}},
      {"port_as_fraction",
       {{"/ServerConfig/port", "1025.5"}},
       {"ServerConfig.port: wrong type", "non-integer number 1025.5"}},
      {"port_too_low",
       {{"/ServerConfig/port", "80"}},
       {"ServerConfig.port: value out of range", "found 80", "[1024, 65535]"}},
      {"port_enormous",
       {{"/ServerConfig/port", "18446744073709551615"}},
       {"ServerConfig.port: value out of range", "18446744073709551615"}},
      {"bad_ip",
       {{"/ServerConfig/ipAddress", "\"localhost\""}},
       {"ServerConfig.ipAddress: not an IP address", "\"localhost\""}},
      {"zero_ip",
       {{"/ServerConfig/ipAddress", "\"0.0.0.0\""}},
       {"ServerConfig.ipAddress: listening on every address", "allowAllZeroIpListening"}},
      {"bad_flag",
       {{"/ServerConfig/allowAllZeroIpListening", "1"}},
       {"ServerConfig.allowAllZeroIpListening: wrong type", "integer 1", "true or false"}},
      {"dmi",
       {{"/ServerConfig/inferMode", "\"dmi\""}},
       {"ServerConfig.inferMode", "disaggregation is not supported"}},
      {"shared_ports",
       {{"/ServerConfig/metricsPort", "1025"}, {"/ServerConfig/managementPort", "1030"}},
       {"business and metrics share a port", "1025, 1030, 1025"}},
      {"node_port",
       {{"/BackendConfig/multiNodesInferPort", "1025"}},
       {"BackendConfig.multiNodesInferPort: the same as ServerConfig.port", "1025"}},
      {"too_many_links",
       {{"/ServerConfig/maxLinkNum", "5000"}},
       {"ServerConfig.maxLinkNum: value out of range", "5000", "[1, 4096]"}},
      {"ca_files",
       {{"/ServerConfig/tlsCaFile", "[]"}},
       {"ServerConfig.tlsCaFile: wrong number of entries", "0 entries"}},
      {"instances",
       {{"/BackendConfig/modelInstanceNumber", "2"}},
       {"BackendConfig.modelInstanceNumber", "several instances"}},
      {"device_count",
       {{"/BackendConfig/npuDeviceIds", "[[0,1,2]]"}},
       {"BackendConfig.npuDeviceIds: does not fit worldSize", "3 ids for worldSize 1", "[[0]]"}},
      {"device_type",
       {{"/BackendConfig/npuDeviceIds", "[0,1]"}},
       {"BackendConfig.npuDeviceIds: wrong type", "array of arrays"}},
      {"backend_name",
       {{"/BackendConfig/backendName", "\"Engine 1\""}},
       {"BackendConfig.backendName: not a backend name", "\"Engine 1\""}},
      {"no_model",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig", "[]"}},
       {"ModelDeployConfig.ModelConfig: wrong number of entries", "0 entries"}},
      {"model_name",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig/0/modelName", "\"a b\""}},
       {"ModelConfig[0].modelName: not a model name", "\"a b\""}},
      {"no_weights",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig/0/modelWeightPath", "\"/no/such/place\""}},
       {"ModelConfig[0].modelWeightPath: no weight directory", "/no/such/place",
        "No such file or directory"}},
      {"backend_type",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig/0/backendType", "\"cuda\""}},
       {"ModelConfig[0].backendType: unknown backend", "\"cuda\""}},
      {"zero_memory",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig/0/npuMemSize", "0"}},
       {"ModelConfig[0].npuMemSize: value out of range", "-1 (automatic)"}},
      {"mock",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig/0/modelInstanceType", "\"StandardMock\""}},
       {"ModelConfig[0].modelInstanceType", "not supported"}},
      {"pipeline",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig/0/pp", "2"}},
       {"ModelConfig[0].pp: pipeline parallelism is not supported", "remove \"pp\""}},
      {"experts",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig/0/moe_ep", "4"}},
       {"ModelConfig[0].moe_ep: World size must equal to MoE's ep_size * MoE's tp_size",
        "found moe_ep 4, expected a product of 1"}},
      {"kv_cache",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig/0/kvCacheDtype", "\"fp8\""}},
       {"ModelConfig[0].kvCacheDtype: unknown type of the KV cache", "found \"fp8\"",
        "expected auto, bf16 (bfloat16) or int8"}},
      {"mtp",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig/0/plugin_params",
         R"({"plugin_type": "mtp", "num_speculative_tokens": 1})"}},
       {"plugin_params.plugin_type: speculation by draft layers is not supported", "found \"mtp\"",
        "expected ngram, la or memory_decoding", "or draft_model", "remove mtp"}},
      {"draft_model_without_model",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig/0/plugin_params",
         R"({"plugin_type": "draft_model"})"}},
       {"plugin_params.model: missing key"}},
      {"draft_model_of_another_cut",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig/0/plugin_params",
         R"({"plugin_type": "draft_model", "model": "weights", "draft_tensor_parallel_size": 2})"}},
       {"plugin_params.draft_tensor_parallel_size", "found 2"}},
      {"draft_model_and_look_up",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig/0/plugin_params",
         R"({"plugin_type": "ngram,draft_model", "model": "weights"})"}},
       {"plugin_params: speculation is asked for twice", "found here and by another plugin_type"}},
      {"draft_of_too_many_tokens",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig/0/plugin_params",
         R"({"plugin_type": "draft_model", "model": "weights", "num_speculative_tokens": 17})"}},
       {"plugin_params.num_speculative_tokens", "found 17"}},
      {"draft_model_that_is_not_there",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig/0/plugin_params",
         R"({"plugin_type": "draft_model", "model": "drafts/none"})"}},
       {"plugin_params: no weight directory", "drafts/none"}},
      {"tp",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig/0/tp", "3"}},
       {"ModelConfig[0].tp: tp is not the number of all ranks", "found 3", "expected 1"}},
      {"too_many_ranks",
       {{"/BackendConfig/ModelDeployConfig/ModelConfig/0/worldSize", "10"},
        {"/BackendConfig/npuDeviceIds", "[[0,1,2,3,4,5,6,7,8,9]]"}},
       {"more ranks than query heads", "found 10 ranks", "at most 9", "use at most 9 ranks"}},
      {"zero_sequence",
       {{"/BackendConfig/ModelDeployConfig/maxSeqLen", "0"}},
       {"ModelDeployConfig.maxSeqLen: value out of range", "found 0"}},
      {"truncation",
       {{"/BackendConfig/ModelDeployConfig/truncation", "2"}},
       {"ModelDeployConfig.truncation: value out of range", "[-1, 1]"}},
      {"prefill_tokens",
       {{"/BackendConfig/ScheduleConfig/maxPrefillTokens", "1024"}},
       {"ScheduleConfig.maxPrefillTokens: smaller than maxInputTokenLen", "found 1024",
        "at least 2048"}},
      {"prefill_batch",
       {{"/BackendConfig/ScheduleConfig/maxPrefillBatchSize", "201"}},
       {"ScheduleConfig.maxPrefillBatchSize: value out of range", "[0, 200]"}},
      {"block",
       {{"/BackendConfig/ScheduleConfig/cacheBlockSize", "256"}},
       {"ScheduleConfig.cacheBlockSize: value out of range", "[1, 128]"}},
      {"template_type",
       {{"/BackendConfig/ScheduleConfig/templateType", "\"Special\""}},
       {"ScheduleConfig.templateType: unknown template", "\"Special\""}},
      {"queue_delay",
       {{"/BackendConfig/ScheduleConfig/maxQueueDelayMicroseconds", "499"}},
       {"ScheduleConfig.maxQueueDelayMicroseconds", "[500, 1000000]"}},
      {"max_n",
       {{"/BackendConfig/ScheduleConfig/maxN", "300"}},
       {"ScheduleConfig.maxN: value out of range", "[1, 200]"}},
  };
  return kMistakes;
}

class MistakeTest : public ConfigTest, public ::testing::WithParamInterface<Mistake> {};

TEST_P(MistakeTest, IsNamedOnOneLine) {
  plant(GetParam(), config_);
  const std::string text = refusal();
  std::istringstream lines(text);
  bool found = false;
  for (std::string line; std::getline(lines, line);) {
    bool all = true;
    for (const char* part : GetParam().message) all = all && contains(line, part);
    found = found || (all && contains(line, ". Fix: "));
  }
  EXPECT_TRUE(found) << text;
  EXPECT_TRUE(contains(text, "(1 problem)")) << text;
}
INSTANTIATE_TEST_SUITE_P(All, MistakeTest, ::testing::ValuesIn(mistakes()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_F(ConfigTest, LoraModulesOfTheFileTheWeightsAndTheCommandLine) {
  fs::create_directories(folder_ / "a");
  fs::create_directories(folder_ / "b");
  const std::string a = (folder_ / "a").string();
  const std::string b = (folder_ / "b").string();
  // Beside the weights, where the key is absent.
  write("weights/lora_adapter.json", json{{"sql", a}}.dump());
  NodeConfig config = load();
  ASSERT_EQ(config.model.lora_modules.size(), 1u);
  EXPECT_EQ(config.model.lora_modules[0].name, "sql");
  EXPECT_EQ(config.model.lora_modules[0].path, a);
  EXPECT_EQ(config.model.max_loras, 0);
  const std::string digest = config.digest;

  deploy()["maxLoras"] = 4;
  deploy()["maxLoraRank"] = 32;
  deploy()["LoraModules"] = json::array({{{"name", "b"}, {"path", b}, {"baseModelName", "demo"}}});
  config = load();
  ASSERT_EQ(config.model.lora_modules.size(), 1u);
  EXPECT_EQ(config.model.lora_modules[0].name, "b");
  EXPECT_EQ(config.model.max_loras, 4);
  EXPECT_EQ(config.model.max_lora_rank, 32);
  EXPECT_NE(config.digest, digest);  // all nodes must share it

  arguments_.lora_modules = {"c=" + a, R"({"name":"d","path":")" + b + "\"}"};
  arguments_.max_loras = 2;
  config = load();
  ASSERT_EQ(config.model.lora_modules.size(), 2u);
  EXPECT_EQ(config.model.lora_modules[0].name, "c");
  EXPECT_EQ(config.model.lora_modules[1].path, b);
  EXPECT_EQ(config.model.max_loras, 2);
}

TEST_F(ConfigTest, LoraMistakesAreNamed) {
  fs::create_directories(folder_ / "a");
  const std::string a = (folder_ / "a").string();
  deploy()["maxLoras"] = 2;
  deploy()["LoraModules"] = json::array({{{"name", "one"}, {"path", a}, {"baseModelName", "other"}},
                                         {{"name", "two"}},
                                         {{"name", "demo"}, {"path", a}},
                                         {{"name", "-x"}, {"path", a}},
                                         {{"name", "gone"}, {"path", a + "/nowhere"}}});
  const std::string text = refusal();
  for (const char* part :
       {"Lora base model not found. Please check. Lora name is one", "found baseModelName \"other\"",
        "not a LoRA module", "name used twice", "not a name of an adapter",
        "no directory of the LoRA adapter 'gone'", "more LoRA adapters than may be loaded"})
    EXPECT_TRUE(contains(text, part)) << part << "\n" << text;
  deploy()["LoraModules"] = "one";
  deploy()["maxLoraRank"] = 5000;
  EXPECT_TRUE(contains(refusal(), "ModelDeployConfig.LoraModules"));
  EXPECT_TRUE(contains(refusal(), "ModelDeployConfig.maxLoraRank"));
  deploy().erase("LoraModules");
  deploy().erase("maxLoraRank");
  write("weights/lora_adapter.json", "[1]");
  EXPECT_TRUE(contains(refusal(), "lora_adapter.json: expected an object"));
  arguments_.lora_modules = {"nopath"};
  EXPECT_TRUE(contains(refusal(), "found \"nopath\", expected name=path"));
}

TEST_F(ConfigTest, TenMistakesAreReportedTogether) {
  int planted = 0;
  std::vector<const char*> expected;
  for (const char* name : {"port_too_low", "bad_ip", "bad_flag", "too_many_links", "backend_name",
                           "model_name", "no_weights", "pipeline", "zero_memory", "block"})
    for (const Mistake& mistake : mistakes())
      if (std::string_view(mistake.name) == name) {
        plant(mistake, config_);
        expected.push_back(mistake.message.front());
        ++planted;
      }
  ASSERT_EQ(planted, 10);
  const std::string text = refusal();
  EXPECT_TRUE(contains(text, "(10 problems)")) << text;
  for (const char* part : expected) EXPECT_TRUE(contains(text, part)) << part << "\n" << text;
}

TEST_F(ConfigTest, BrokenFileIsNamedWithLineAndColumn) {
  const std::string path = write("conf/config.json", "{\n  \"ServerConfig\": {,}\n}");
  arguments_.config_file = path;
  try {
    (void)load_node_config(arguments_, environment_);
    FAIL();
  } catch (const Error& error) {
    EXPECT_TRUE(contains(error.what(), path + ": not valid JSON at line 2, column"))
        << error.what();
  }
}

TEST_F(ConfigTest, FileIsLookedForInThreePlaces) {
  config_["ServerConfig"]["port"] = 2001;
  write("conf/config.json", config_.dump());
  EXPECT_EQ(load_node_config({}, environment_).server.port, 2001);
  config_["ServerConfig"]["port"] = 2002;
  environment_["MIES_CONFIG_JSON_PATH"] = write("other.json", config_.dump());
  EXPECT_EQ(load_node_config({}, environment_).server.port, 2002);
  config_["ServerConfig"]["port"] = 2003;
  arguments_.config_file = write("third.json", config_.dump());
  EXPECT_EQ(load_node_config(arguments_, environment_).server.port, 2003);
}

TEST_F(ConfigTest, AbsentFileOpenModeAndLinkAreRefused) {
  arguments_.config_file = (folder_ / "none.json").string();
  const auto refused = [this] {
    try {
      (void)load_node_config(arguments_, environment_);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_TRUE(contains(refused(), "none.json: no configuration file"));
  EXPECT_TRUE(contains(refused(), "phalanx config make"));
  arguments_.config_file = write("open.json", config_.dump(), 0644);
  EXPECT_TRUE(contains(refused(), "0644")) << refused();
  EXPECT_TRUE(contains(refused(), "chmod 640")) << refused();
  const fs::path link = folder_ / "link.json";
  fs::create_symlink(write("real.json", config_.dump()), link);
  arguments_.config_file = link.string();
  EXPECT_TRUE(contains(refused(), "symbolic link")) << refused();
  arguments_.config_file = write("empty.json", "");
  EXPECT_TRUE(contains(refused(), "empty")) << refused();
}

TEST_F(ConfigTest, DocumentedAsOptionalKeysMayBeAbsent) {
  server().erase("metricsPort");
  server().erase("managementIpAddress");
  model().erase("trustRemoteCode");
  backend().erase("multiNodesInferEnabled");
  backend().erase("interNodeTLSEnabled");
  server()["managementPort"] = 1026;
  const NodeConfig config = load();
  EXPECT_EQ(config.server.metrics_port, 1027);
  EXPECT_EQ(config.server.management_ip_address, "127.0.0.1");
  EXPECT_FALSE(config.backend.inter_node_tls.has_value());
}

TEST_F(ConfigTest, MisspelledKeyIsNamedWithItsLikelyMeaning) {
  server()["maxLinkNumm"] = 3;
  const std::string ignored = joined(load().ignored);
  EXPECT_TRUE(contains(ignored, "ServerConfig.maxLinkNumm (unknown key, did you mean maxLinkNum?)"))
      << ignored;
}

TEST_F(ConfigTest, MultiNodeTakesRanksFromTheTable) {
  make_multi_node();
  backend()["npuDeviceIds"] = {{0, 1, 2}};
  const NodeConfig config = load();
  EXPECT_EQ(config.table.world_size, 2);
  EXPECT_EQ(config.model.world_size, 2);
  EXPECT_EQ(config.own_server, 1);
  EXPECT_EQ(config.server.ip_address, "127.0.0.2");
  EXPECT_TRUE(contains(joined(config.warnings), "npuDeviceIds: found 3 ids for worldSize 1"));
}

TEST_F(ConfigTest, MultiNodeNeedsATableAndItsOwnEntry) {
  make_multi_node();
  environment_["MIES_CONTAINER_IP"] = "127.0.0.9";
  EXPECT_TRUE(contains(refusal(), "127.0.0.9")) << refusal();
  environment_.erase("RANK_TABLE_FILE");
  EXPECT_TRUE(contains(refusal(), "environment variable RANK_TABLE_FILE: multiNodesInferEnabled"))
      << refusal();
}

TEST_F(ConfigTest, OldNameOfTheTableIsAcceptedWithAWarning) {
  make_multi_node();
  environment_["RANKTABLEFILE"] = environment_["RANK_TABLE_FILE"];
  environment_.erase("RANK_TABLE_FILE");
  environment_["http_proxy"] = "http://proxy:3128";
  const NodeConfig config = load();
  EXPECT_EQ(config.table.world_size, 2);
  EXPECT_TRUE(contains(joined(config.warnings), "RANKTABLEFILE is the old name"));
  EXPECT_TRUE(contains(joined(config.warnings), "http_proxy is set"));
}

TEST_F(ConfigTest, TlsBetweenNodesIsOnUnlessLoopbackOrSwitchedOff) {
  make_multi_node();
  backend()["interNodeTLSEnabled"] = true;
  EXPECT_TRUE(contains(refusal(), "TLS between nodes is on, and this node has no certificate"))
      << refusal();
  EXPECT_TRUE(contains(refusal(), "security/grpc/certs/server.pem")) << refusal();
  EXPECT_TRUE(contains(refusal(), "phalanx certs init --rank-table '")) << refusal();
  backend().erase("interNodeTLSEnabled");
  EXPECT_EQ(refusal(), "");  // loopback addresses only
  std::string table = kTwoServers;
  for (const char* host : {"127.0.0.1", "127.0.0.2"})
    for (size_t at; (at = table.find(host)) != std::string::npos;)
      table.replace(at, 9, std::string("10.9.8.") + host[8]);
  environment_["RANK_TABLE_FILE"] = write("ranktable.json", table);
  environment_["MIES_CONTAINER_IP"] = "10.9.8.2";
  EXPECT_TRUE(contains(refusal(), "addresses that are not loopback: 10.9.8.1, 10.9.8.2"))
      << refusal();
  EXPECT_TRUE(contains(refusal(), "\"interNodeTLSEnabled\": false")) << refusal();
  backend()["interNodeTLSEnabled"] = false;
  EXPECT_FALSE(contains(refusal(), "TLS between nodes")) << refusal();
  environment_["PHALANX_DATA_PLANE"] = "tls";
  EXPECT_TRUE(contains(refusal(), "data plane cannot run under TLS")) << refusal();
  environment_["PHALANX_DATA_PLANE"] = "ucx";
  if (const std::string why = comm::ucx_problem(); !why.empty()) {
    EXPECT_TRUE(contains(refusal(), "there are no links over UCX here")) << refusal();
    EXPECT_TRUE(contains(refusal(), why)) << refusal();
    return;
  }
  EXPECT_FALSE(contains(refusal(), "PHALANX_DATA_PLANE")) << refusal();
  environment_["PHALANX_DATA_PLANE"] = "rdma";
  EXPECT_TRUE(contains(refusal(), "expected tls, clear, ucx, or clear,ucx")) << refusal();
  backend()["interNodeTLSEnabled"] = true;
  environment_["PHALANX_DATA_PLANE"] = "ucx";
  EXPECT_TRUE(contains(refusal(), "UCX carries tensors in clear, and TLS between nodes is on"))
      << refusal();
  EXPECT_TRUE(contains(refusal(), "export PHALANX_DATA_PLANE=clear,ucx")) << refusal();
  environment_["PHALANX_DATA_PLANE"] = "clear,ucx";
  EXPECT_FALSE(contains(refusal(), "PHALANX_DATA_PLANE")) << refusal();
}

TEST_F(ConfigTest, SingleNodeRefusesTheTableOfTwoServers) {
  environment_["RANK_TABLE_FILE"] = write("ranktable.json", kTwoServers);
  const std::string text = refusal();
  EXPECT_TRUE(contains(text, "a single-node start with the rank table of several servers"));
  EXPECT_TRUE(contains(text, "found 2 servers, expected 1 server"));
  EXPECT_TRUE(contains(text, "unset RANK_TABLE_FILE"));
}

TEST_F(ConfigTest, BadVariablesAreNamed) {
  environment_["NPU_MEMORY_FRACTION"] = "1.5";
  environment_["HCCL_CONNECT_TIMEOUT"] = "soon";
  environment_["PHALANX_DATA_PORTS"] = "3000-2000";
  environment_["PHALANX_THREADS"] = "0";
  environment_["ATB_LLM_LOGITS_SAVE_ENABLE"] = "1";
  environment_["MIES_CONTAINER_MANAGEMENT_IP"] = "here";
  const std::string text = refusal();
  EXPECT_TRUE(contains(text, "(6 problems)")) << text;
  for (const char* name : {"NPU_MEMORY_FRACTION: bad value, found \"1.5\"",
                           "HCCL_CONNECT_TIMEOUT: bad value, found \"soon\"",
                           "PHALANX_DATA_PORTS: bad value, found \"3000-2000\"",
                           "PHALANX_THREADS: bad value, found \"0\"", "ATB_LLM_LOGITS_SAVE_FOLDER",
                           "MIES_CONTAINER_MANAGEMENT_IP: not an IP address"})
    EXPECT_TRUE(contains(text, name)) << name << "\n" << text;
}

TEST_F(ConfigTest, GoodVariablesAreHonoured) {
  environment_["NPU_MEMORY_FRACTION"] = "0.5";
  environment_["HCCL_CONNECT_TIMEOUT"] = "7200";
  environment_["PHALANX_DATA_PORTS"] = "20000-20063";
  environment_["OMP_NUM_THREADS"] = "3";
  environment_["LOG_LEVEL"] = "debug";
  const NodeConfig config = load();
  EXPECT_EQ(config.npu_memory_fraction, 0.5);
  EXPECT_EQ(config.connect_timeout_s, 7200);
  EXPECT_EQ(config.data_port_begin, 20000);
  EXPECT_EQ(config.data_port_end, 20063);
  EXPECT_EQ(config.threads_per_rank, 3);
  EXPECT_TRUE(contains(joined(config.warnings), "LOG_LEVEL is the old name of MINDIE_LOG_LEVEL"));
}

TEST_F(ConfigTest, StartsWithoutFiles) {
  arguments_.model = (folder_ / "weights/").string();
  arguments_.tp = 3;
  arguments_.port = 9000;
  const NodeConfig config = load_node_config(arguments_, environment_);
  EXPECT_EQ(config.model.name, "weights");
  EXPECT_EQ(config.table.world_size, 3);
  EXPECT_EQ(config.server.port, 9000);
  EXPECT_EQ(config.server.management_port, 9000);
  EXPECT_EQ(config.server.metrics_port, 9000);
  EXPECT_FALSE(config.server.https);
  EXPECT_EQ(config.model.max_sequence, 4096);
  arguments_.tp = 10;
  EXPECT_THROW((void)load_node_config(arguments_, environment_), Error);
}

TEST_F(ConfigTest, OptionsWithoutModelAndModelFileAreRefused) {
  arguments_.tp = 2;
  EXPECT_TRUE(contains(refusal(), "--tp: option without --model")) << refusal();
  ServeArguments gguf{.model = write("a.gguf", "GGUF")};
  try {
    (void)load_node_config(gguf, environment_);
    FAIL();
  } catch (const Error& error) {
    EXPECT_TRUE(contains(error.what(), "phalanx import")) << error.what();
  }
}

TEST_F(ConfigTest, BrokenModelConfigIsNamed) {
  write("weights/config.json", "{\"num_attention_heads\": ");
  EXPECT_TRUE(contains(refusal(), "weights/config.json: not valid JSON")) << refusal();
  fs::remove(folder_ / "weights/config.json");
  EXPECT_TRUE(contains(refusal(), "the weight directory has no config.json")) << refusal();
}

TEST_F(ConfigTest, DigestFollowsSharedSettingsOnly) {
  const std::string digest = load().digest;
  server()["port"] = 3000;
  server()["ipAddress"] = "127.0.0.3";
  EXPECT_EQ(load().digest, digest);
  deploy()["maxSeqLen"] = 2000;
  EXPECT_NE(load().digest, digest);
}

TEST_F(ConfigTest, LogVariablesAreReadWithTheirOldNames) {
  std::vector<std::string> warnings;
  environment_ = {{"HOME", folder_.string()},
                  {"MINDIE_LLM_LOG_LEVEL", "llm:debug;server:warn"},
                  {"MINDIE_LOG_TO_FILE", "1"},
                  {"MINDIE_LOG_PATH", (folder_ / "logs").string()},
                  {"MINDIE_LOG_ROTATE", "-fs 3 -r 4"}};
  LogOptions options = node_log_options(environment_, warnings);
  EXPECT_EQ(joined(warnings), "");
  EXPECT_EQ(options.level, LogLevel::kDebug);
  EXPECT_EQ(options.file_mb, 3);
  EXPECT_EQ(options.file_count, 4);
  EXPECT_TRUE(options.file.starts_with((folder_ / "logs/debug/mindie-server_").string()));
  EXPECT_TRUE(fs::is_directory(folder_ / "logs/debug"));
  environment_ = {{"MINDIE_LOG_LEVEL", "loud"}, {"MINDIE_LOG_ROTATE", "-fs 0"}};
  options = node_log_options(environment_, warnings);
  EXPECT_EQ(options.level, LogLevel::kInfo);
  EXPECT_EQ(warnings.size(), 2u);
}

TEST(LogLevelStateTest, ALevelHoldsForItsHoursOnly) {
  constexpr int64_t kNow = 1800000000;
  LogLevelState state;
  LogLevelKeys keys{.level = "debug", .valid_hours = 1};
  EXPECT_EQ(state.level_at({}, LogLevel::kInfo, kNow), LogLevel::kInfo);
  EXPECT_EQ(state.level_at(keys, LogLevel::kInfo, kNow), LogLevel::kDebug);
  EXPECT_EQ(state.level_at(keys, LogLevel::kInfo, kNow + 3599), LogLevel::kDebug);
  EXPECT_EQ(state.level_at(keys, LogLevel::kInfo, kNow + 3600), LogLevel::kInfo);
  keys.level = "ERROR";  // written again: from now on
  EXPECT_EQ(state.level_at(keys, LogLevel::kInfo, kNow + 4000), LogLevel::kError);
  keys.valid_time = "2020-01-01 00:00:00";  // long over
  EXPECT_EQ(state.level_at(keys, LogLevel::kInfo, kNow + 4001), LogLevel::kInfo);
  keys.valid_time = "2090-01-01 00:00:00";  // a beginning in the future counts as now
  EXPECT_EQ(state.level_at(keys, LogLevel::kInfo, kNow + 4002), LogLevel::kError);
  EXPECT_EQ(keys.problem(), "");
  keys = {.level = "loud", .valid_hours = 200, .valid_time = "soon"};
  for (const char* part : {"\"loud\"", "found 200", "\"soon\""})
    EXPECT_TRUE(contains(keys.problem(), part)) << keys.problem();
}

TEST(ConfigMakeTest, SetReachesAnyKey) {
  const json config = json::parse(
      make_config_json({.model = "/m",
                        .set = {"BackendConfig.ScheduleConfig.maxBatchSize=7",
                                "BackendConfig.ModelDeployConfig.ModelConfig[0].modelName=abc"}}));
  EXPECT_EQ(config["BackendConfig"]["ScheduleConfig"]["maxBatchSize"], 7);
  EXPECT_EQ(config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]["modelName"], "abc");
  EXPECT_THROW((void)make_config_json({.set = {"nothing"}}), Error);
  EXPECT_THROW((void)make_config_json({.set = {"Version.x=1"}}), Error);
}

}  // namespace
}  // namespace phalanx::apps
