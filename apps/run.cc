#include "apps/run.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "apps/config_adapters.h"
#include "apps/config_file.h"
#include "apps/config_environment.h"
#include "apps/config_log.h"
#include "apps/generation_defaults.h"
#include "apps/instance.h"
#include "apps/kv_option.h"
#include "apps/prompt_head.h"
#include "apps/run_report.h"
#include "phalanx/net/address.h"
#include "phalanx/base/json.h"
#include "phalanx/base/log.h"
#include "phalanx/text/chat_template.h"
#include "phalanx/text/tokenizer.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

struct RunArguments {
  std::string model_path;
  std::vector<std::string> input_texts = {"What's deep learning?"};
  std::vector<std::string> input_ids;
  std::string input_file;
  std::string input_dict;
  int64_t max_prefill_batch_size = 0;
  int64_t max_batch_size = 1;
  int64_t max_input_length = 1024;
  int64_t max_output_length = 20;
  int64_t max_position_embeddings = 0;
  int64_t max_prefill_tokens = -1;
  int64_t block_size = 128;
  std::string chat_template;
  bool ignore_eos = false;
  bool is_chat_model = false;
  bool is_embedding_model = false;
  std::string load_tokenizer = "True";
  std::string kw_args;
  int tp = -1;
  std::map<std::string, int> other_parallel;  // dp, sp, cp, pp, ...: only -1 and 1 mean nothing
  std::string lora_modules;
  int max_loras = 0;
  int max_lora_rank = 0;
  bool enable_atb_torch = false;
  bool trust_remote_code = false;
  bool distributed_enable = false;
  std::string inter_node_tls, certs;
  std::optional<models::KvDtype> kv;
  int64_t moe_tp = -1;
  int64_t moe_ep = -1;
};

void add_options(CLI::App& app, RunArguments& a) {
  app.add_option("--model_path", a.model_path, "checkpoint directory")->required();
  app.add_option("--input_texts", a.input_texts, "prompts, or files that hold one each");
  app.add_option("--input_ids", a.input_ids, "comma-separated token ids, one text per prompt");
  app.add_option("--input_file", a.input_file, "jsonl of conversations, with --is_chat_model");
  app.add_option("--input_dict", a.input_dict, "JSON list of {prompt, adapter}");
  app.add_option("--max_prefill_batch_size", a.max_prefill_batch_size)->check(CLI::PositiveNumber);
  app.add_option("--max_batch_size", a.max_batch_size)->check(CLI::PositiveNumber);
  app.add_option("--max_input_length", a.max_input_length)->check(CLI::PositiveNumber);
  app.add_option("--max_output_length", a.max_output_length)->check(CLI::PositiveNumber);
  app.add_option("--max_position_embeddings", a.max_position_embeddings);
  app.add_option("--max_prefill_tokens", a.max_prefill_tokens);
  app.add_option("--block_size", a.block_size)->check(CLI::Range(1, 128));
  app.add_option("--chat_template", a.chat_template, "template text or file");
  app.add_flag("--ignore_eos", a.ignore_eos);
  app.add_flag("--is_chat_model", a.is_chat_model);
  app.add_flag("--is_embedding_model", a.is_embedding_model);
  app.add_option("--load_tokenizer", a.load_tokenizer, "False needs --input_ids")
      ->check(CLI::IsMember({"true", "false", "1", "0"}, CLI::ignore_case));
  app.add_flag("--enable_atb_torch", a.enable_atb_torch, "accepted, without effect");
  app.add_flag("--trust_remote_code", a.trust_remote_code, "accepted, without effect");
  app.add_option("--kw_args", a.kw_args, "accepted, without effect");
  app.add_option("--tp", a.tp, "number of ranks (all of them)");
  app.add_option("--moe_tp", a.moe_tp, "ranks that share an expert (-1: all)");
  app.add_option("--moe_ep", a.moe_ep, "runs of ranks that hold whole experts (-1: 1)");
  for (const char* name : {"dp", "sp", "cp", "pp", "microbatch_size"})
    app.add_option("--" + std::string(name), a.other_parallel[name], "only -1 or 1");
  for (auto& [name, value] : a.other_parallel) value = -1;
  app.add_option("--lora_modules", a.lora_modules, "LoRA adapters as JSON: {\"name\": \"path\"}; --input_dict names them");
  app.add_option("--max_loras", a.max_loras, "adapters at once (those of --lora_modules)")->check(CLI::Range(0, 1024));
  app.add_option("--max_lora_rank", a.max_lora_rank, "highest rank of an adapter (that of --lora_modules)")->check(CLI::Range(0, 1024));
  app.add_flag("--distributed_enable", a.distributed_enable, "accepted, without effect");
  add_kv_option(app, a.kv);
  app.add_option("--certs", a.certs, "folder that 'phalanx certs init' filled: TLS between nodes");
  app.add_option("--inter-node-tls", a.inter_node_tls,
                 "off: clear text between hosts (also PHALANX_INTER_NODE_TLS=off)")
      ->check(CLI::IsMember({"off"}));
}

std::string get(const Environment& environment, const std::string& name) {
  const auto it = environment.find(name);
  return it == environment.end() ? "" : it->second;
}

std::optional<int> number(const Environment& environment, const std::string& name, int low, int high,
                          Problems& problems) {
  const std::string text = get(environment, name);
  if (text.empty()) return std::nullopt;
  int value = 0;
  const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (failed != std::errc() || end != text.data() + text.size() || value < low || value > high) {
    problems.add({.what = "not usable", .where = name, .found = "'" + text + "'",
                  .expected = fmt::format("an integer in [{}, {}]", low, high),
                  .fix = fmt::format("export {}=<number>", name)});
    return std::nullopt;
  }
  return value;
}

// moe_ep x moe_tp is all ranks; -1: what makes it so.
void place_experts(const RunArguments& a, int64_t ranks, NodeConfig& config, Problems& problems) {
  const auto known = [](int64_t n) { return n == -1 || n >= 1; };
  const int64_t ep = a.moe_ep != -1 ? a.moe_ep : a.moe_tp >= 1 ? ranks / a.moe_tp : 1;
  const int64_t tp = a.moe_tp != -1 ? a.moe_tp : ep >= 1 ? ranks / ep : 0;
  if (known(a.moe_ep) && known(a.moe_tp) && ep * tp == ranks) {
    config.model.moe_ep = ep;
    return;
  }
  problems.add({.what = "World size must equal to MoE's ep_size * MoE's tp_size",
                .where = "--moe_ep, --moe_tp",
                .found = fmt::format("moe_ep {}, moe_tp {}", a.moe_ep, a.moe_tp),
                .expected = fmt::format("a product of {}, the number of all ranks", ranks),
                .fix = "leave --moe_ep and --moe_tp out"});
}

// The table for one process per rank: every rank is a node of its own, found at its server.
cluster::RankTable one_node_per_rank(const cluster::RankTable& table) {
  cluster::RankTable split;
  split.world_size = table.world_size;
  for (int rank = 0; rank < table.world_size; ++rank) {
    const cluster::Server& server = table.servers[static_cast<size_t>(table.server_of_rank(rank))];
    split.servers.push_back({.server_id = server.server_id,
                             .container_ip = server.container_ip,
                             .devices = {table.device_of_rank(rank)}});
  }
  return split;
}

cluster::RankTable local_table(int ranks) {
  cluster::RankTable table;
  table.world_size = ranks;
  table.servers.push_back({.server_id = "127.0.0.1", .container_ip = "127.0.0.1"});
  for (int rank = 0; rank < ranks; ++rank)
    table.servers[0].devices.push_back({.device_id = rank, .rank_id = rank});
  return table;
}

void place_ranks(const RunArguments& a, const Environment& environment, NodeConfig& config,
                 Problems& problems) {
  const std::string table_file = get(environment, "RANK_TABLE_FILE");
  const std::optional<int> world = number(environment, "WORLD_SIZE", 1, 1 << 20, problems);
  const std::optional<int> rank = number(environment, "RANK", 0, (1 << 20) - 1, problems);
  const std::optional<int> local_rank = number(environment, "LOCAL_RANK", 0, (1 << 20) - 1, problems);
  if (const auto port = number(environment, "MASTER_PORT", 1, 65535, problems))
    config.backend.multi_nodes_port = *port;
  if (!table_file.empty()) {
    config.table = cluster::load_rank_table(table_file);
  } else if (rank && world && *world > 1) {
    problems.add({.what = "RANK says this is one rank of several, but there is no rank table",
                  .where = "RANK_TABLE_FILE", .found = "unset",
                  .expected = "the path of a rank table with all ranks",
                  .fix = "make one: phalanx ranktable make --hosts A,B -o ranktable.json"});
    return;
  } else {
    config.table = local_table(world.value_or(std::max(1, a.tp)));
  }
  const int total = config.table.world_size;
  if (world && *world != total)
    problems.add({.what = "WORLD_SIZE and the rank table disagree", .where = "WORLD_SIZE",
                  .found = std::to_string(*world),
                  .expected = fmt::format("{}, the number of devices in {}", total, table_file),
                  .fix = "correct one of the two"});
  if (a.tp > 0 && a.tp != total)
    problems.add({.what = "only tensor parallelism over all ranks is supported", .where = "--tp",
                  .found = std::to_string(a.tp), .expected = fmt::format("{} or -1", total),
                  .fix = "leave --tp out"});
  place_experts(a, total, config, problems);
  if (rank && *rank >= total) {
    problems.add({.what = "no such rank", .where = "RANK", .found = std::to_string(*rank),
                  .expected = fmt::format("0 to {}", total - 1), .fix = "correct RANK or the table"});
    return;
  }
  if (rank) {
    const cluster::Server& server =
        config.table.servers[static_cast<size_t>(config.table.server_of_rank(*rank))];
    if (local_rank && *local_rank == *rank && *rank >= static_cast<int>(server.devices.size()))
      config.warnings.push_back(
          fmt::format("LOCAL_RANK {} equals RANK although the node has {} devices; taken as rank {}'s "
                      "own place in the rank table",
                      *local_rank, server.devices.size(), *rank));
    config.table = one_node_per_rank(config.table);
    config.own_server = *rank;
  } else if (config.table.servers.size() > 1) {
    std::string own_ip = get(environment, "MIES_CONTAINER_IP");
    config.own_server = cluster::find_own_server(config.table, own_ip,
                                                 get(environment, "HOST_IP"), table_file);
  }
}

// Clear text between hosts must be asked for by name.
void protect_traffic(const RunArguments& a, const Environment& environment, NodeConfig& config,
                     Problems& problems) {
  const bool off = a.inter_node_tls == "off" || get(environment, "PHALANX_INTER_NODE_TLS") == "off";
  Problems warnings;
  const InterNodeRequest request{
      .table = config.table,
      .own_server = config.own_server,
      .written = off               ? std::optional<bool>(false)
                 : a.certs.empty() ? std::nullopt
                                   : std::optional<bool>(true),
      .how_to_switch_off = "--inter-node-tls=off or PHALANX_INTER_NODE_TLS=off",
      .data_plane = get(environment, "PHALANX_DATA_PLANE"),
      .table_path = get(environment, "RANK_TABLE_FILE"),
      .home = ".",
      .certs = a.certs};
  config.inter_node = load_inter_node_tls(request, {}, problems, warnings);
  for (const Problem& warning : warnings.list())
    config.warnings.push_back(to_string(warning));
}

// --lora_modules: {"name": "path", ...}.
void read_adapters(const RunArguments& a, ModelConfig& model, Problems& problems) {
  model.max_loras = a.max_loras;
  model.max_lora_rank = a.max_lora_rank;
  if (!a.lora_modules.empty()) {
    model.lora_modules_named = true;
    try {
      const json modules = parse_json(a.lora_modules, "--lora_modules", 4);
      if (!modules.is_object())
        throw Error(Code::kInvalidArgument, "--lora_modules: expected {\"name\": \"path\", ...}");
      for (const auto& [name, path] : modules.items()) {
        if (!path.is_string())
          throw Error(Code::kInvalidArgument,
                      fmt::format("--lora_modules: {}: found {}, expected a path", name, path.dump()));
        model.lora_modules.push_back(
            {.name = name, .path = path.get<std::string>(), .where = "--lora_modules"});
      }
    } catch (const Error& error) {
      problems.add({.what = error.what(), .where = "--lora_modules"});
    }
  }
  complete_adapters(model, false, problems);
}

NodeConfig make_config(const RunArguments& a, const Environment& environment) {
  Problems problems;
  NodeConfig config;
  config.model.name = std::filesystem::path(a.model_path).filename();
  config.model.weight_path = a.model_path;
  config.model.max_input_tokens = a.max_input_length;
  config.model.max_sequence = a.max_input_length + a.max_output_length;
  if (a.max_position_embeddings > 0)
    config.model.max_sequence = std::min(config.model.max_sequence, a.max_position_embeddings);
  if (!a.chat_template.empty()) config.model.chat_template = a.chat_template;
  config.schedule.cache_block_size = a.block_size;
  config.schedule.max_batch = a.max_batch_size;
  config.schedule.max_prefill_batch =
      a.max_prefill_batch_size > 0 ? a.max_prefill_batch_size : a.max_batch_size;
  config.schedule.max_prefill_tokens =
      a.max_prefill_tokens > 0 ? a.max_prefill_tokens
                               : a.max_batch_size * (a.max_input_length + a.max_output_length);
  config.schedule.max_output_tokens = a.max_output_length;
  config.model.kv = a.kv.value_or(models::KvDtype::kCheckpoint);
  config.npu_memory_fraction = 1.0;
  if (const std::string fraction = get(environment, "NPU_MEMORY_FRACTION"); !fraction.empty()) {
    config.npu_memory_fraction = std::strtod(fraction.c_str(), nullptr);
    if (!(config.npu_memory_fraction > 0 && config.npu_memory_fraction <= 1))
      problems.add({.what = "not usable", .where = "NPU_MEMORY_FRACTION", .found = "'" + fraction + "'",
                    .expected = "more than 0, at most 1", .fix = "export NPU_MEMORY_FRACTION=0.8"});
  }
  if (const auto threads = number(environment, "PHALANX_THREADS", 1, 1024, problems))
    config.threads_per_rank = *threads;
  read_memory_speed(environment, config, problems);
  config.cpus = get(environment, "PHALANX_CPUS");
  if (const auto seconds = number(environment, "HCCL_CONNECT_TIMEOUT", 1, 1 << 30, problems))
    config.connect_timeout_s = *seconds;
  else
    config.connect_timeout_s = 120;
  if (const std::string on_loss = get(environment, "PHALANX_ON_LOSS"); on_loss == "wait" || on_loss == "shrink") {
    config.recover = true;
    config.shrink = on_loss == "shrink";
  } else if (!on_loss.empty() && on_loss != "fail") {
    problems.add({.what = "not usable", .where = "PHALANX_ON_LOSS", .found = "'" + on_loss + "'",
                  .expected = "wait, shrink or fail", .fix = "unset it"});
  }
  if (const std::string save = get(environment, "ATB_LLM_LOGITS_SAVE_ENABLE"); !save.empty() && save != "0")
    config.logits_folder = get(environment, "ATB_LLM_LOGITS_SAVE_FOLDER");
  if (a.is_embedding_model)
    problems.add({.what = "embedding models are not supported", .where = "--is_embedding_model",
                  .fix = "leave it out"});
  read_adapters(a, config.model, problems);
  for (const auto& [name, value] : a.other_parallel)
    if (value != -1 && value != 1)
      problems.add({.what = "this kind of parallelism is not supported", .where = "--" + name,
                    .found = std::to_string(value), .expected = "-1 or 1",
                    .fix = "leave --" + name + " out"});
  for (const auto& [used, name] : std::initializer_list<std::pair<bool, const char*>>{
           {a.enable_atb_torch, "--enable_atb_torch"},
           {a.trust_remote_code, "--trust_remote_code"},
           {a.distributed_enable, "--distributed_enable"},
           {!a.kw_args.empty(), "--kw_args"},
           {!get(environment, "ATB_LLM_HCCL_ENABLE").empty(), "ATB_LLM_HCCL_ENABLE"}})
    if (used) config.ignored.emplace_back(name);
  place_ranks(a, environment, config, problems);
  if (problems.empty()) protect_traffic(a, environment, config, problems);
  problems.throw_if_any("this run cannot start");
  return config;
}

// --- Prompts ------------------------------------------------------------------------------------

std::string text_or_file(const std::string& text) {
  struct stat st {};
  if (text.size() < 4096 && ::stat(text.c_str(), &st) == 0 && S_ISREG(st.st_mode))
    return read_text_file(text, 100 << 20);
  return text;
}

std::vector<int32_t> parse_ids(const std::string& text) {
  std::vector<int32_t> ids;
  std::stringstream parts(text);
  std::string part;
  while (std::getline(parts, part, ',')) {
    int32_t id = 0;
    const char* begin = part.data() + std::min(part.find_first_not_of(' '), part.size());
    const auto [end, failed] = std::from_chars(begin, part.data() + part.size(), id);
    if (failed != std::errc() || end != part.data() + part.size() || id < 0)
      throw Error(Code::kInvalidArgument,
                  fmt::format("--input_ids: found '{}' in '{}', expected token ids separated by "
                              "commas, such as 1,15043,29871",
                              part, text));
    ids.push_back(id);
  }
  return ids;
}

class Prompts {
 public:
  Prompts(const RunArguments& a, const text::Tokenizer* tokenizer, const text::ChatTemplate* chat)
      : tokenizer_(tokenizer), chat_(chat), is_chat_(a.is_chat_model) {
    // Priority of run_pa: dictionary, then ids, then file or texts.
    if (!a.input_dict.empty()) {
      const json list = parse_json(a.input_dict, "--input_dict");
      if (!list.is_array())
        throw Error(Code::kInvalidArgument, "--input_dict: expected a list of {\"prompt\": ...}");
      for (const json& entry : list) {
        if (!entry.is_object() || !entry.contains("prompt") || !entry["prompt"].is_string())
          throw Error(Code::kInvalidArgument,
                      fmt::format("--input_dict: found {}, expected an object with a text \"prompt\"",
                                  entry.dump()));
        add_text(entry["prompt"].get<std::string>());
        adapters.push_back(adapter_of(entry));
      }
    } else if (!a.input_ids.empty()) {
      for (const std::string& ids : a.input_ids) prompts.push_back(parse_ids(ids));
    } else if (!a.input_file.empty()) {
      if (!is_chat_)
        throw Error(Code::kInvalidArgument,
                    "--input_file holds conversations. Fix: add --is_chat_model");
      std::stringstream lines(read_text_file(a.input_file, 100 << 20));
      std::string line;
      int64_t number = 0;
      while (std::getline(lines, line)) {
        ++number;
        if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
        add_conversation(parse_json(line, fmt::format("{}: line {}", a.input_file, number)));
      }
    } else {
      for (const std::string& text : a.input_texts) add_text(text_or_file(text));
    }
    if (prompts.empty()) throw Error(Code::kInvalidArgument, "there is no prompt to run");
    adapters.resize(prompts.size());
  }
  std::vector<std::vector<int32_t>> prompts;
  std::vector<std::string> adapters;  // of each; empty: the base model

 private:
  static std::string adapter_of(const json& entry) {
    const auto at = entry.find("adapter");
    if (at == entry.end() || at->is_null() || *at == "base" || *at == "None") return "";
    if (!at->is_string())
      throw Error(Code::kInvalidArgument,
                  fmt::format("--input_dict: adapter: found {}, expected a name of --lora_modules, or "
                              "\"base\"",
                              at->dump()));
    return at->get<std::string>();
  }
  void add_text(const std::string& text) {
    if (tokenizer_ == nullptr)
      throw Error(Code::kInvalidArgument, "--load_tokenizer False needs --input_ids");
    if (is_chat_) add_conversation(json::array({{{"role", "user"}, {"content", text}}}));
    else prompts.push_back(tokenizer_->encode(text, true));
  }
  void add_conversation(const json& messages) {
    if (tokenizer_ == nullptr || chat_ == nullptr)
      throw Error(Code::kInvalidArgument,
                  "--is_chat_model needs a checkpoint with a tokenizer and a chat template");
    prompts.push_back(tokenizer_->encode(chat_->render({.messages_json = messages.dump()}), false));
  }

  const text::Tokenizer* tokenizer_;
  const text::ChatTemplate* chat_;
  bool is_chat_;
};

}  // namespace

int run_main(int argc, char** argv) {
  ::umask(0027);
  RunArguments arguments;
  CLI::App app{"Offline inference with the options of run_pa."};
  add_options(app, arguments);
  CLI11_PARSE(app, argc, argv);
  const Environment environment = process_environment();
  const NodeConfig config = make_config(arguments, environment);
  const bool one_rank = environment.count("RANK") > 0;
  std::vector<std::string> warnings = config.warnings;
  LogOptions log = node_log_options(environment, warnings);
  if (one_rank) log.tag = fmt::format("rank {} of {}", config.own_server, config.table.world_size);
  set_up_log(log);
  for (const std::string& warning : warnings) log_warn("{}", warning);
  if (!config.ignored.empty())
    log_warn("accepted without effect: {}", fmt::join(config.ignored, ", "));
  const HostResources host = host_resources();
  const NodePlan plan = plan_node(config, host);
  const bool wants_tokenizer =
      arguments.load_tokenizer[0] == 'T' || arguments.load_tokenizer[0] == 't' || arguments.load_tokenizer[0] == '1';

  Instance instance(config, plan);
  std::atomic<int> failed{0};
  std::shared_ptr<const text::Tokenizer> tokenizer;
  if (instance.is_master()) {
    for (const std::string& line : format_report(config, plan)) log_info("{}", line);
    if (!config.table.has_auto_weights())
      log_info("who computes which outputs:\n{}", layout_table(config, plan));
    std::shared_ptr<const text::ChatTemplate> chat;
    if (wants_tokenizer) {
      tokenizer = text::Tokenizer::load(config.model.weight_path);
      if (arguments.is_chat_model)
        chat = text::ChatTemplate::load(config.model.weight_path, arguments.chat_template);
    }
    const Prompts prompts(arguments, tokenizer.get(), chat.get());
    const api::GenerationDefaults defaults = read_generation_defaults(config.model.weight_path);
    std::vector<engine::GenerateRequest> requests;
    for (size_t i = 0; i < prompts.prompts.size(); ++i) {
      const std::vector<int32_t>& prompt = prompts.prompts[i];
      if (static_cast<int64_t>(prompt.size()) > config.schedule.max_prefill_tokens)
        throw Error(Code::kInvalidArgument,
                    fmt::format("req: {} input length: {} is too long, max_prefill_tokens: {}", i,
                                prompt.size(), config.schedule.max_prefill_tokens));
      engine::GenerateRequest request{.id = fmt::format("run-{}", i), .prompt = prompt};
      request.sampling.temperature = 0;
      request.sampling.max_tokens = static_cast<int32_t>(arguments.max_output_length);
      request.adapter = prompts.adapters[i];
      const auto& modules = config.model.lora_modules;
      if (!request.adapter.empty() &&
          std::none_of(modules.begin(), modules.end(),
                       [&](const LoraModule& m) { return m.name == request.adapter; }))
        throw Error(Code::kInvalidArgument,
                    fmt::format("--input_dict: adapter: found \"{}\", expected a name of "
                                "--lora_modules, or \"base\"",
                                request.adapter));
      if (!arguments.ignore_eos) request.sampling.stop_token_ids = defaults.eos_token_ids;
      requests.push_back(std::move(request));
    }
    fmt::print("---------------begin inference---------------\n------total req num: {}, infer start--------\n",
               requests.size());
    const bool benchmark = get(environment, "ATB_LLM_BENCHMARK_ENABLE") != "" &&
                           get(environment, "ATB_LLM_BENCHMARK_ENABLE") != "0";
    const std::string csv = get(environment, "ATB_LLM_BENCHMARK_FILEPATH");
    std::vector<int64_t> prompt_lengths;
    for (const auto& request : requests)
      prompt_lengths.push_back(static_cast<int64_t>(request.prompt.size()));
    instance.set_head(std::make_unique<PromptHead>(
        instance, std::move(requests), arguments.max_batch_size,
        [&, benchmark, csv, prompt_lengths](const std::vector<PromptResult>& results) {
          fmt::print("---------------end inference---------------\n");
          for (size_t i = 0; i < results.size(); ++i) {
            const PromptResult& r = results[i];
            if (r.error) {
              failed = 1;
              fmt::print(stderr, "phalanx: request {}: {}\n", i, r.error->what());
              continue;
            }
            fmt::print("Answer[{}]: {}\n", i,
                       tokenizer ? tokenizer->decode(r.tokens, true) : fmt::format("{}", fmt::join(r.tokens, ",")));
            fmt::print("Generate[{}] token num: {}\n", i, r.tokens.size());
          }
          if (benchmark)
            report_benchmark(results, prompt_lengths, csv.empty() ? "./benchmark_result/benchmark.csv" : csv);
          std::fflush(stdout);
        }));
  }
  const int status = instance.run();
  return status != 0 ? status : failed.load();
}

}  // namespace phalanx::apps
