#include "apps/serve.h"

#include <fmt/format.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "apps/check.h"
#include "apps/config_security.h"
#include "apps/config_watch.h"
#include "apps/generation_defaults.h"
#include "apps/instance.h"
#include "apps/kv_option.h"
#include "apps/config_log.h"
#include "phalanx/api/http_server.h"
#include "phalanx/api/plane_tls.h"
#include "phalanx/api/request_journal.h"
#include "phalanx/api/service.h"
#include "phalanx/base/log.h"
#include "phalanx/cluster/credentials.h"
#include "phalanx/engine/engine_options.h"
#include "phalanx/text/chat_template.h"
#include "phalanx/text/tokenizer.h"

namespace phalanx::apps {
namespace {

api::ServiceOptions service_options(const NodeConfig& c, const NodePlan& plan) {
  const models::ModelInfo& info = plan.info;
  const auto dtype = [&] {
    switch (info.dtype) {
      case tensor::DType::kBF16: return "bfloat16";
      case tensor::DType::kF16: return "float16";
      default: return "float32";
    }
  };
  // The whole list of what is wrong; the ranks say the first of it.
  std::function<void(const std::string&)> check_adapter;
  if (plan.adapters.slots > 0)
    check_adapter = [info, rank = plan.adapters.max_rank](const std::string& path) {
      (void)models::check_adapter(info, path, rank);
    };
  return {.model_name = c.model.name,
          .model_aliases = c.model.aliases,
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
          .full_text = c.server.full_text,
          .check_adapter = std::move(check_adapter)};
}

// Certificates of the listeners, or null where there is no TLS.
std::unique_ptr<api::PlaneTls> open_tls(const ServerConfig& server) {
  if (!server.https) return nullptr;
  std::vector<api::PlaneTls::Plane> planes;
  for (const PlaneListener& listener : plane_listeners(server))
    planes.push_back(listener_tls(listener, server));
  Problems warnings;  // shown by the check before
  return std::make_unique<api::PlaneTls>(std::move(planes), warnings, api::PlaneTls::Options{});
}

// The certificate between nodes as its files are; null without TLS.
std::unique_ptr<api::PlaneTls> watch_inter_node(const NodeConfig& config) {
  if (config.inter_node.material == nullptr) return nullptr;
  Problems warnings;
  return std::make_unique<api::PlaneTls>(
      std::vector{api::PlaneTls::Plane{
          .files = config.inter_node.material->files(),
          .needs = cluster::node_needs(config.table, config.own_server),
          .address = {}}},
      warnings, api::PlaneTls::Options{});
}

void record(const api::AccessRecord& r) {
  log_info("{}", api::to_line(r));
  if (r.method == "GET" || r.method == "HEAD") {
    // Probes are no operations; what changes the service is.
    if (r.path != "/stopService") return;
  }
  log_audit(r.peer, fmt::format("Response mindie server, method={}, uri is {}", r.method, r.path),
            fmt::format("status code: {}", r.status));
}

api::ServerOptions server_options(const NodeConfig& config, const api::PlaneTls* tls) {
  const ServerConfig& s = config.server;
  api::ServerOptions options;
  const auto listeners = plane_listeners(s);
  for (size_t i = 0; i < listeners.size(); ++i) {
    api::ListenerOptions listener{listeners[i].address, static_cast<uint16_t>(listeners[i].port),
                                  listeners[i].planes};
    if (tls != nullptr) listener.tls = [tls, i] { return tls->current(i); };
    options.listeners.push_back(std::move(listener));
  }
  options.work_threads = static_cast<int>(std::min<int64_t>(config.backend.tokenizer_threads, 4));
  options.max_body_bytes = s.max_request_mb << 20;
  options.max_requests = 3 * s.max_link_num;
  options.max_connections = 3 * s.max_link_num + 100;
  options.gate = {.key_digests = s.key_digests,
                  .origins = s.cors_origins,
                  .methods = s.cors_methods,
                  .headers = s.cors_headers,
                  .credentials = s.cors_credentials};
  options.on_finished = record;
  return options;
}

// The HTTP side of the master. Ports are taken at construction, before anything loads.
class HttpHead final : public Head {
 public:
  HttpHead(const NodeConfig& config, const NodePlan& plan, Instance& instance,
           const api::PlaneTls* inter_node, std::unique_ptr<api::JournalFile> journal)
      : instance_(instance),
        inter_node_(inter_node),
        options_(service_options(config, plan)),
        tokenizer_(text::Tokenizer::load(config.model.weight_path)),
        chat_template_(text::ChatTemplate::load(config.model.weight_path,
                                                config.model.chat_template.value_or(""))),
        tls_(open_tls(config.server)),
        journal_(journal ? std::make_unique<api::RequestJournal>(std::move(*journal)) : nullptr),
        server_(server_options(config, tls_.get())) {
    options_.request_journal = journal_ != nullptr;
  }

  void open(engine::Engine& engine) override {
    service_ = std::make_unique<api::Service>(
        options_, engine, tokenizer_, chat_template_, [this] { return health(); },
        [this] { return status(); },
        [this] { instance_.stop("GET /stopService"); });
    if (journal_) journal_->mount(server_);
    service_->mount(server_);
    server_.start();
    if (journal_) journal_->answer_what_was_left();
    open_ = true;
  }
  void drain(Deadline deadline) override {
    if (open_) server_.stop(deadline);
  }
  void fail(const Error&) override {}  // the engine tells every request; health() tells probes

 private:
  std::string status() const {
    auto json = nlohmann::json::parse(instance_.status_json());
    auto list = nlohmann::json::array();
    for (const api::PlaneTls* tls : {inter_node_, static_cast<const api::PlaneTls*>(tls_.get())}) {
      if (tls == nullptr) continue;
      for (const auto& expiry : tls->expiries())
        list.push_back({{"plane", expiry.plane}, {"not_after", expiry.not_after}});
    }
    if (!list.empty()) json["certificates"] = std::move(list);
    return json.dump();
  }
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
      health.state = view.recovering ? api::InstanceState::kRecovering
                                     : api::InstanceState::kServing;
      if (view.recovering) {
        health.reason = view.recovering->what();
        if (!view.spares.empty())
          health.reason += fmt::format("; spare: {}", fmt::join(view.spares, ", "));
      }
    }
    return health;
  }

  Instance& instance_;
  const api::PlaneTls* const inter_node_;
  api::ServiceOptions options_;
  std::shared_ptr<const text::Tokenizer> tokenizer_;
  std::shared_ptr<const text::ChatTemplate> chat_template_;
  std::unique_ptr<api::PlaneTls> tls_;
  std::unique_ptr<api::RequestJournal> journal_;  // outlives the server
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
  for (const std::string& line : format_report(config, plan)) log_info("{}", line);
  if (config.table.has_auto_weights())
    log_info("the rank table leaves weights to measurement: they are decided when all nodes are there");
  else
    log_info("who computes which outputs:\n{}", layout_table(config, plan));
  if (plan.local_ranks.empty()) {
    log_info("this node is a spare: it loads nothing until it takes over the ranks of a lost node");
    return;
  }
  log_info("memory of this node: weights {}, workspace {}, KV cache up to {} per rank, of {} ({})",
           format_bytes(weights), format_bytes(workspace), format_bytes(plan.kv_bytes_per_rank),
           format_bytes(host.memory_bytes), host.memory_source);
  int64_t adapters = 0;
  for (const models::MemoryNeed& need : plan.needs) adapters += need.adapter_bytes;
  if (plan.adapters.slots > 0)
    log_info("LoRA adapters: up to {} of rank {} or less, {} of memory reserved on this node",
             plan.adapters.slots, plan.adapters.max_rank, format_bytes(adapters));
}

// The master's journal, open; null without one, or with a problem added.
std::unique_ptr<api::JournalFile> open_journal(const std::string& path, const CheckReport& report,
                                               Problems& problems) {
  if (path.empty() || !report.plan || report.config.own_server != report.config.table.master())
    return nullptr;
  try {
    return std::make_unique<api::JournalFile>(path);
  } catch (const Error& error) {
    problems.add({.what = error.what(), .where = "--request-journal"});
  }
  return nullptr;
}

// Room for every connection that is allowed.
void raise_file_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

}  // namespace

void add_serve_options(CLI::App& app, ServeArguments& arguments) {
  ServeArguments& a = arguments;
  app.add_option("--config-file", a.config_file, "config.json (else MIES_CONFIG_JSON_PATH, else <home>/conf/config.json)");
  app.add_option("--model", a.model, "checkpoint directory; serve it on this machine, no files needed");
  app.add_option("--tp", a.tp, "number of ranks on this machine, with --model")->check(CLI::Range(1, 1024));
  app.add_option("--host", a.host, "address to listen on, with --model (127.0.0.1)");
  app.add_option("--port", a.port, "port, with --model (1025)")->check(CLI::Range(1, 65535));
  app.add_option_function<std::vector<std::string>>(
         "--served-model-name",
         [&a](const std::vector<std::string>& names) {
           a.served_model_name = names.front();
           a.aliases.assign(names.begin() + 1, names.end());
         },
         "names in the API; with --model the first is the model's own name, else all are aliases")
      ->expected(1, 16);
  app.add_option("--speculative-config", a.speculative_config, R"(speculation, from the text so far: {"method": "ngram", "num_speculative_tokens": 5}, or by a draft model: {"method": "draft_model", "model": DIR})");
  app.add_option("--draft-model", a.draft_model, "checkpoint directory of a small model with the same tokenizer that guesses tokens (speculation)");
  app.add_option("--draft-tokens", a.draft_tokens, "its guesses per request and step (5)")->check(CLI::Range(int64_t{1}, engine::kMostDraftTokens));
  app.add_option("--lora-modules", a.lora_modules, "LoRA adapters to load: name=path ...")->expected(1, 1024);
  app.add_option("--max-loras", a.max_loras, "LoRA adapters at once; 0: those of --lora-modules")->check(CLI::Range(0, 1024));
  app.add_option("--max-lora-rank", a.max_lora_rank, "highest rank of an adapter; 0: that of --lora-modules, at least 16 with --max-loras")->check(CLI::Range(0, 1024));
  add_kv_option(app, a.kv);
  app.add_option("--certs", a.certs, "folder that 'phalanx certs init' filled (else the install directory)");
  app.add_option("--api-key", a.api_keys, "clients must send one of these keys (Authorization: Bearer); better --api-key-file")
      ->expected(1, 1000);
  app.add_option("--api-key-file", a.api_key_file, "one key per line, mode 0600");
  app.add_option("--https-client-auth", a.https_client_auth, "required (default), or none: one-way TLS, with API keys")
      ->check(CLI::IsMember({"required", "none"}));
  app.add_option("--ssl-certfile", a.ssl_certfile, "HTTPS certificate, with --model");
  app.add_option("--ssl-keyfile", a.ssl_keyfile, "its key, with --model");
  app.add_option("--ssl-ca-certs", a.ssl_ca_certs, "authorities of client certificates, with --model; without: API keys are needed");
  app.add_option("--allowed-origins", a.allowed_origins, "CORS: origins, or *; default none")->expected(1, 1000);
  app.add_option("--allowed-methods", a.allowed_methods, "CORS: methods (*)")->expected(1, 100);
  app.add_option("--allowed-headers", a.allowed_headers, "CORS: headers (*)")->expected(1, 100);
  app.add_flag("--allow-credentials", a.allow_credentials, "CORS: cookies and authorization");
}

void hide_secrets(const ServeArguments& arguments, int argc, char** argv) {
  for (int i = 1; i < argc; ++i)
    for (const std::string& key : arguments.api_keys) {
      std::string_view text(argv[i]);
      const size_t at = text.size() >= key.size() ? text.size() - key.size() : 0;
      const bool is_value = text == key || text == "--api-key=" + key;
      if (is_value) std::memset(argv[i] + at, '*', key.size());
    }
}

int serve_main(int argc, char** argv) {
  ::umask(0027);
  ServeArguments arguments;
  std::string expert_parallel;
  CLI::App app{"Starts one node of an instance. Without a config file: --model DIR."};
  add_serve_options(app, arguments);
  app.add_option("--expert-parallel", expert_parallel, "accepted, without effect");
  std::string isa = "common";
  app.add_option("--isa", isa, "common (default): all nodes compute in the best numeric class that all of them have; mixed: each in its own best one, and tokens may differ. The same on all nodes")
      ->check(CLI::IsMember({"common", "mixed"}))->envname("PHALANX_ISA");
  std::string on_loss = "wait";
  double recovery_seconds = 300;
  double drain_seconds = 3;
  app.add_option("--on-loss", on_loss, "when a rank or node is lost: wait (default: for its return, or a spare; running requests pause and go on), shrink (the same, but if nobody comes the others go on over fewer ranks), or fail (requests get an error that names it, the nodes exit). The master's counts")
      ->check(CLI::IsMember({"wait", "shrink", "fail"}))->envname("PHALANX_ON_LOSS");
  app.add_option("--recovery-seconds", recovery_seconds, "unless --on-loss=fail: longest time without a lost node, or of a slave without its master, before all exit, or shrink (300)")
      ->check(CLI::Range(1.0, 1e6))->envname("PHALANX_RECOVERY_SECONDS");
  double spare_seconds = 10;
  app.add_option("--spare-seconds", spare_seconds, "how long a lost node may stay away before a spare of the rank table takes over its ranks (10). The master's counts")
      ->check(CLI::Range(0.0, 1e6))->envname("PHALANX_SPARE_SECONDS");
  app.add_option("--drain-seconds", drain_seconds, "time that running requests have to finish after SIGTERM (3)")
      ->check(CLI::Range(0.0, 1e6))->envname("PHALANX_DRAIN_SECONDS");
  double stuck_seconds = 2.5;
  app.add_option("--stuck-seconds", stuck_seconds, "a rank process without CPU time for so long is named stuck and replaced; 0: never, for work with a debugger (2.5)")
      ->check(CLI::Range(0.0, 1e6))->envname("PHALANX_STUCK_SECONDS");
  std::string journal_path;
  app.add_option("--request-journal", journal_path, "file in which accepted requests that are no streams are kept until they are answered; after a crash of the master they are answered, and fetched with GET /v1/requests/ID. The master's counts")
      ->envname("PHALANX_REQUEST_JOURNAL");
  CLI11_PARSE(app, argc, argv);
  hide_secrets(arguments, argc, argv);
  raise_file_limit();

  const Environment environment = process_environment();
  CheckReport report = check_start(arguments, environment, {.ports = true, .text = false});
  NodeConfig& config = report.config;
  std::unique_ptr<api::JournalFile> journal = open_journal(journal_path, report, report.problems);
  if (!report.problems.empty()) {
    fmt::print(stderr, "phalanx: cannot start with this configuration ({} problem{}):\n{}",
               report.problems.list().size(), report.problems.list().size() == 1 ? "" : "s",
               findings_table(report.problems));
    return 1;
  }
  config.warnings.clear();
  for (const Problem& warning : report.warnings.list())
    config.warnings.push_back(to_string(warning));
  if (isa == "mixed" && config.table.servers.size() == 1)
    config.ignored.emplace_back("--isa mixed (there is one node)");
  config.recover = on_loss != "fail";
  config.shrink = on_loss == "shrink";
  config.spare_seconds = spare_seconds;
  config.recovery_seconds = recovery_seconds;
  config.drain_seconds = drain_seconds;
  config.stuck_seconds = stuck_seconds;
  const cluster::Server& own = config.table.servers[static_cast<size_t>(config.own_server)];
  LogOptions log = node_log_options(environment, config.warnings);
  log.tag = fmt::format("node {}", own.address());
  set_up_log(log);
  const HostResources host = host_resources();
  const NodePlan& plan = *report.plan;
  show_start(config, plan, host);

  std::unique_ptr<api::PlaneTls> inter_node;  // the head looks at it
  Instance instance(config, plan);
  inter_node = watch_inter_node(config);  // its thread must not take the signals blocked just now
  if (inter_node != nullptr)
    instance.set_renewed_tls([tls = inter_node.get()] {
      const auto context = tls->current(0);
      return std::shared_ptr<const net::TlsMaterial>(context, &context->material());
    });
  const ConfigWatch watch(config.config_path, log.level);
  instance.set_mixed_classes(isa == "mixed");
  instance.set_success_line("Daemon start success!");
  if (instance.is_master()) instance.set_head(std::make_unique<HttpHead>(config, plan, instance, inter_node.get(), std::move(journal)));
  log_audit("system", "Start mindie server", "success");
  const int status = instance.run();
  log_audit("system", "stop mindie server", status == 0 ? "success" : "fail");
  return status;
}

}  // namespace phalanx::apps
