#pragma once

// config.json, the environment and the command line of a node, read and validated whole before any
// socket opens. Key by key: docs/configuration.md.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "apps/config_inter_node.h"
#include "phalanx/base/error.h"
#include "phalanx/cluster/rank_table.h"
#include "phalanx/models/model.h"
#include "phalanx/net/tls_material.h"

namespace phalanx::apps {

struct ServerConfig {
  std::string ip_address = "127.0.0.1";  // MIES_CONTAINER_IP replaces it
  std::string management_ip_address;     // MIES_CONTAINER_MANAGEMENT_IP replaces it
  int port = 1025, management_port = 1026, metrics_port = 1027;
  bool allow_all_zero_ip = false;
  int64_t max_link_num = 1000;
  int64_t max_request_mb = 40;
  int max_json_depth = 10;
  bool full_text = false;
  std::string open_ai_support = "vllm";
  double token_timeout_s = 600, e2e_timeout_s = 600;
  bool https = true;  // httpsEnabled
  bool client_certificates = true;  // false: one-way TLS, with API keys
  net::TlsFiles business_tls, management_tls, metrics_tls;  // whole paths
  std::vector<std::string> key_digests;  // SHA-256 of the API keys
  std::vector<std::string> cors_origins, cors_methods = {"*"}, cors_headers = {"*"};
  bool cors_credentials = false;
};

struct BackendConfig {
  bool multi_nodes = false;  // multiNodesInferEnabled
  int multi_nodes_port = 1120;
  std::optional<bool> inter_node_tls;  // interNodeTLSEnabled as written, if written
  InterNodeKeys inter_node_keys;
  int64_t tokenizer_threads = 8;
  std::vector<std::vector<int>> device_ids;
};

// A LoRA adapter that is loaded at the start.
struct LoraModule {
  std::string name, path;
  std::string where;  // of the setting, for messages
};

struct ModelConfig {
  std::string name, weight_path;
  int64_t max_sequence = 2560, max_input_tokens = 2048;
  int truncation = 0;
  int64_t world_size = 1;
  int64_t cpu_mem_gb = 0;
  int64_t npu_mem_gb = -1;  // -1: automatic
  std::optional<std::string> chat_template;
  std::string tool_call_parser;     // a registered name; empty: the family's own
  bool enable_reasoning = false;
  std::vector<std::string> aliases;  // other names that requests may use
  int64_t moe_ep = 1;  // runs of neighbouring ranks that hold whole experts
  models::KvDtype kv = models::KvDtype::kCheckpoint;
  int64_t max_loras = 0;      // LoRA adapters at once; 0: those of lora_modules
  int64_t max_lora_rank = 0;  // 0: the highest of lora_modules, and at least 16 with max_loras
  bool lora_modules_named = false;  // LoraModules or --lora-modules, even if empty
  std::vector<LoraModule> lora_modules;
};

struct ScheduleConfig {
  int64_t cache_block_size = 128;
  int64_t max_prefill_batch = 50, max_prefill_tokens = 8192;
  int64_t max_batch = 200, max_output_tokens = 512;
  int64_t max_preempt_count = 0, max_queue_delay_us = 5000, max_n = 128;
};

// What the engine does beside batching; only the master's counts.
struct PluginConfig {
  bool prefix_cache = true, chunked_prefill = true;
  int64_t draft_tokens = 0;                     // speculation; 0: none
  std::string draft_model;                      // that guesses: a checkpoint's directory; empty: prompt look-up
  std::string draft_where;                      // who says so, for messages; empty: no speculation was asked for
  int64_t lookup_most = 4, lookup_least = 2;    // tokens of the run that is looked up
};

// Everything a node needs to start.
struct NodeConfig {
  std::string config_path;  // empty: started from the command line alone
  std::string home;         // install directory, base of relative paths
  ServerConfig server;
  BackendConfig backend;
  ModelConfig model;
  ScheduleConfig schedule;
  PluginConfig plugins;
  cluster::RankTable table;  // made up (one server, worldSize ranks) if not multi-node
  int own_server = 0;
  double npu_memory_fraction = 0.8;            // NPU_MEMORY_FRACTION
  double connect_timeout_s = 0;                // HCCL_CONNECT_TIMEOUT; 0: not set
  int data_port_begin = 0, data_port_end = 0;  // PHALANX_DATA_PORTS=a-b; 0: any
  std::string data_plane;                      // PHALANX_DATA_PLANE as written
  std::string certs;                           // --certs: base of security files instead of home
  InterNodeTls inter_node;                     // what all that comes to, files read and checked
  std::string logits_folder;                   // ATB_LLM_LOGITS_SAVE_ENABLE/_FOLDER
  int threads_per_rank = 0;                    // PHALANX_THREADS; 0: cores / local ranks
  double memory_gbps = 0;                      // PHALANX_MEMORY_GBPS; 0: measured where needed
  std::string cpus;                            // PHALANX_CPUS: "", auto, none or a list
  bool recover = false;                        // --on-loss=wait or shrink
  double recovery_seconds = 300;               // --recovery-seconds
  double spare_seconds = 10;                   // --spare-seconds
  bool shrink = false;                         // --on-loss=shrink
  double drain_seconds = 3;                    // --drain-seconds
  double stuck_seconds = 2.5;                  // --stuck-seconds; 0: a frozen rank is waited for
  std::vector<std::string> ignored;            // keys and variables accepted without effect
  std::vector<std::string> warnings;           // one line each
  std::string digest;  // of the effective settings that all nodes must share
};

struct ServeArguments {
  std::string config_file;  // --config-file
  std::string model;        // --model DIR (no config file then)
  int tp = 0;               // --tp N; 0: one rank
  std::string host;         // --host A; empty: 127.0.0.1
  int port = 0;             // --port P; 0: 1025
  std::optional<std::string> served_model_name;  // --served-model-name, the first
  std::vector<std::string> aliases;              // the others
  std::vector<std::string> api_keys;             // --api-key
  std::string api_key_file;                      // --api-key-file
  std::string ssl_certfile, ssl_keyfile, ssl_ca_certs;  // --ssl-*, with --model
  std::string https_client_auth;                 // --https-client-auth: "required", "none", or empty
  std::vector<std::string> allowed_origins, allowed_methods, allowed_headers;
  bool allow_credentials = false;
  std::string certs;                             // --certs DIR; empty: the install directory
  std::string speculative_config;                // --speculative-config JSON
  std::string draft_model;                       // --draft-model DIR
  int64_t draft_tokens = 0;                      // --draft-tokens K; 0: 5
  std::vector<std::string> lora_modules;         // --lora-modules
  std::optional<int64_t> max_loras, max_lora_rank;
  std::optional<models::KvDtype> kv;             // --kv-dtype; before config.json's
};

// The settings that all nodes must share, by their key names, for comparison at a join; the digest
// is made of these. Addresses, paths and what a node may choose for itself are not among them.
[[nodiscard]] std::vector<std::pair<std::string, std::string>> shared_settings(
    const NodeConfig& config);

using Environment = std::map<std::string, std::string>;
[[nodiscard]] Environment process_environment();

// Finds, admits, parses and validates everything and goes on after every finding; the result is of
// use for further checks, and for a start only if there was no problem. Opens no socket, reads no
// weights.
[[nodiscard]] NodeConfig examine_node_config(const ServeArguments& arguments,
                                             const Environment& environment, Problems& problems,
                                             Problems& warnings);

// The same; throws Error(kInvalidArgument) with all
// problems at once. Opens no socket, reads no weights.
[[nodiscard]] NodeConfig load_node_config(const ServeArguments& arguments,
                                          const Environment& environment);

}  // namespace phalanx::apps
