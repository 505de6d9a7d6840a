#include "apps/serve.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "apps/generation_defaults.h"
#include "apps/instance.h"
#include "apps/config_log.h"
#include "phalanx/api/http_server.h"
#include "phalanx/api/service.h"
#include "phalanx/base/log.h"
#include "phalanx/text/chat_template.h"
#include "phalanx/text/tokenizer.h"

namespace phalanx::apps {
namespace {

// Which plane listens where (config-json.md §4.2; row 5 differs on purpose: the management routes
// stay on the management address).
std::vector<api::ListenerOptions> plane_listeners(const ServerConfig& s) {
  struct Place {
    std::string address;
    int port;
    unsigned plane;
  };
  std::vector<api::ListenerOptions> listeners;
  for (const Place& place : {Place{s.ip_address, s.port, api::kBusiness},
                             Place{s.management_ip_address, s.management_port, api::kManagement},
                             Place{s.management_ip_address, s.metrics_port, api::kMetrics}}) {
    const auto same = std::find_if(listeners.begin(), listeners.end(), [&](const auto& l) {
      return l.address == place.address && l.port == place.port;
    });
    if (same != listeners.end()) same->planes |= place.plane;
    else listeners.push_back({place.address, static_cast<uint16_t>(place.port), place.plane});
  }
  return listeners;
}

api::ServiceOptions service_options(const NodeConfig& c, const models::ModelInfo& info) {
  const auto dtype = [&] {
    switch (info.dtype) {
      case tensor::DType::kBF16: return "bfloat16";
      case tensor::DType::kF16: return "float16";
      default: return "float32";
    }
  };
  return {.model_name = c.model.name,
          .model_path = c.model.weight_path,
          .model_dtype = dtype(),
          .max_sequence = c.model.max_sequence,
          .max_input_tokens = std::min(c.model.max_input_tokens, c.model.max_sequence - 1),
          .max_output_tokens = c.schedule.max_output_tokens,
          .max_position_embeddings = info.max_position_embeddings,
          .vocab_size = info.vocab_size,
          .max_batch = c.schedule.max_batch,
          .max_prefill_batch = c.schedule.max_prefill_batch,
          .max_prefill_tokens = c.schedule.max_prefill_tokens,
          .max_n = c.schedule.max_n,
          .max_link_num = c.server.max_link_num,
          .npu_mem_size = c.model.npu_mem_gb,
          .cpu_mem_size = c.model.cpu_mem_gb,
          .world_size = c.table.world_size,
          .cache_block_size = c.schedule.cache_block_size,
          .max_json_depth = c.server.max_json_depth,
          .max_request_mb = c.server.max_request_mb,
          .truncation = c.model.truncation,
          .token_timeout_s = c.server.token_timeout_s,
          .e2e_timeout_s = c.server.e2e_timeout_s,
          .defaults = read_generation_defaults(c.model.weight_path),
          .model_type = info.model_type,
          .call_format = c.model.tool_call_parser,
          .enable_reasoning = c.model.enable_reasoning,
          .thinks = read_thinking_default(c.model.weight_path),
          .full_text = c.server.full_text};
}

// The HTTP side of the master. Ports are taken at construction, before anything loads.
class HttpHead final : public Head {
 public:
  HttpHead(const NodeConfig& config, const NodePlan& plan, Instance& instance)
      : instance_(instance),
        options_(service_options(config, plan.info)),
        tokenizer_(text::Tokenizer::load(config.model.weight_path)),
        chat_template_(text::ChatTemplate::load(config.model.weight_path,
                                                config.model.chat_template.value_or(""))),
        server_({.listeners = plane_listeners(config.server),
                 .work_threads = static_cast<int>(std::min<int64_t>(config.backend.tokenizer_threads, 4)),
                 .max_body_bytes = config.server.max_request_mb << 20,
                 .max_connections = 3 * config.server.max_link_num + 100}) {}

  void open(engine::Engine& engine) override {
    service_ = std::make_unique<api::Service>(
        options_, engine, tokenizer_, chat_template_, [this] { return health(); },
        [this] { return instance_.status_json(); },
        [this] { instance_.stop("GET /stopService"); });
    service_->mount(server_);
    server_.start();
    open_ = true;
  }
  void drain(Deadline deadline) override {
    if (open_) server_.stop(deadline);
  }
  void fail(const Error&) override {}  // the engine tells every request; health() tells probes

 private:
  api::InstanceHealth health() {
    const InstanceView view = instance_.view();
    api::InstanceHealth health{.lost = view.lost};
    if (view.failure) {
      health.state = api::InstanceState::kFailed;
      health.reason = view.failure->what();
    } else if (view.draining) {
      health.state = api::InstanceState::kDraining;
    } else {
      // Routes exist only from open() on, when every rank has confirmed.
      health.state = api::InstanceState::kServing;
    }
    return health;
  }

  Instance& instance_;
  api::ServiceOptions options_;
  std::shared_ptr<const text::Tokenizer> tokenizer_;
  std::shared_ptr<const text::ChatTemplate> chat_template_;
  api::Server server_;
  std::unique_ptr<api::Service> service_;
  bool open_ = false;
};

void show_start(const NodeConfig& config, const NodePlan& plan, const HostResources& host) {
  if (!config.config_path.empty()) log_info("configuration: {}", config.config_path);
  for (const std::string& warning : config.warnings) log_warn("{}", warning);
  if (!config.ignored.empty())
    log_warn("accepted without effect: {}", fmt::join(config.ignored, ", "));
  int64_t weights = 0;
  int64_t workspace = 0;
  for (const models::MemoryNeed& need : plan.needs) {
    weights += need.weight_bytes;
    workspace += need.workspace_bytes;
  }
  log_info("model {}: {} ({} layers, {} parameters' bytes), cut over {} rank{}", config.model.name,
           plan.info.model_type, plan.info.num_layers, format_bytes(plan.info.parameter_bytes),
           config.table.world_size, config.table.world_size == 1 ? "" : "s");
  if (plan.info.formats != nullptr)
    log_info("number formats ({}): {}; other layers {}", plan.info.formats->source,
             plan.info.formats->summary(), tensor::dtype_name(plan.info.dtype));
  log_info("who computes which outputs:\n{}", layout_table(config, plan));
  log_info("memory of this node: weights {}, workspace {}, KV cache up to {} per rank, of {} ({})",
           format_bytes(weights), format_bytes(workspace), format_bytes(plan.kv_bytes_per_rank),
           format_bytes(host.memory_bytes), host.memory_source);
}

}  // namespace

int serve_main(int argc, char** argv) {
  ::umask(0027);
  ServeArguments arguments;
  std::string expert_parallel;
  CLI::App app{"Starts one node of an instance. Without a config file: --model DIR."};
  app.add_option("--config-file", arguments.config_file, "config.json (else MIES_CONFIG_JSON_PATH, else <home>/conf/config.json)");
  app.add_option("--model", arguments.model, "checkpoint directory; serve it on this machine, no files needed");
  app.add_option("--tp", arguments.tp, "number of ranks on this machine, with --model")->check(CLI::Range(1, 1024));
  app.add_option("--host", arguments.host, "address to listen on, with --model (127.0.0.1)");
  app.add_option("--port", arguments.port, "port, with --model (1025)")->check(CLI::Range(1, 65535));
  std::string served_name;
  app.add_option("--served-model-name", served_name, "name in the API, with --model");
  app.add_option("--expert-parallel", expert_parallel, "accepted, without effect");
  std::string on_loss = "fail";
  app.add_option("--on-loss", on_loss, "when a rank is lost: fail (running requests get an error that names it, the nodes exit)")
      ->check(CLI::IsMember({"fail"}));
  CLI11_PARSE(app, argc, argv);
  if (!served_name.empty()) arguments.served_model_name = served_name;

  const Environment environment = process_environment();
  NodeConfig config = load_node_config(arguments, environment);
  const cluster::Server& own = config.table.servers[static_cast<size_t>(config.own_server)];
  LogOptions log = node_log_options(environment, config.warnings);
  log.tag = fmt::format("node {}", own.address());
  set_up_log(log);
  const HostResources host = host_resources();
  const NodePlan plan = plan_node(config, host);
  show_start(config, plan, host);

  Instance instance(config, plan);
  instance.set_success_line("Daemon start success!");
  if (instance.is_master()) instance.set_head(std::make_unique<HttpHead>(config, plan, instance));
  return instance.run();
}

}  // namespace phalanx::apps
