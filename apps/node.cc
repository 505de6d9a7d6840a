#include "apps/node.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <nlohmann/json.hpp>
#include <thread>
#include <utility>

#include "apps/build_identity.h"
#include "apps/config_plugins.h"
#include "apps/draft_model.h"
#include "apps/file_digest.h"
#include "phalanx/base/check.h"
#include "phalanx/base/log.h"
#include "phalanx/base/progress.h"
#include "phalanx/engine/drafter.h"
#include "phalanx/engine/engine_options.h"
#include "phalanx/models/kv_format.h"
#include "phalanx/net/address.h"
#include "phalanx/ops/isa.h"
#include "phalanx/weights/arena.h"

namespace phalanx::apps {
namespace {

constexpr double kRankAnswerSeconds = 60;
constexpr double kLoadSeconds = 24 * 3600;

// Ranks that share this machine's memory: those of every server whose address is local.
int ranks_on_this_machine(const NodeConfig& config, const cluster::Seating& seats) {
  return static_cast<int>(std::count_if(seats.begin(), seats.end(), [&](const cluster::Seat& seat) {
    return seat.server == config.own_server ||
           net::is_local(config.table.servers[static_cast<size_t>(seat.server)].address());
  }));
}

// Fewer ranks than the configuration's, after a loss, may not divide into as many runs. Who holds
// which expert changes no bit.
int64_t moe_ep_of(const NodeConfig& config, size_t ranks) {
  int64_t runs = config.model.moe_ep;
  while (runs > 1 && ranks != static_cast<size_t>(config.table.world_size) &&
         ranks % static_cast<size_t>(runs) != 0)
    --runs;
  return runs;
}

models::ModelOptions model_options(const NodeConfig& config, const NodePlan& plan, int rank,
                                   ops::Isa isa) {
  return {.directory = config.model.weight_path,
          .isa = isa,
          .max_step_tokens = plan.max_step_tokens,
          .max_step_rows = plan.max_step_rows,
          .max_sequence = config.model.max_sequence,
          .block_size = config.schedule.cache_block_size,
          .kv = config.model.kv,
          .weights = plan.weights,
          .moe_ep = moe_ep_of(config, plan.weights.size()),
          .rank = rank,
          .max_adapters = plan.adapters.slots,
          .max_adapter_rank = plan.adapters.max_rank,
          .threads = plan.threads_per_rank};
}

// Whole on rank 0, with the step's tokens; its rows are the sequences that draft.
models::ModelOptions draft_options(const NodeConfig& config, const NodePlan& plan, ops::Isa isa) {
  models::ModelOptions options = model_options(config, plan, 0, isa);
  options.directory = config.plugins.draft_model;
  options.max_step_rows = plan.draft->sequences;
  options.weights = {1.0};
  options.moe_ep = 1;
  options.max_adapters = options.max_adapter_rank = 0;  // what it guesses is checked
  return options;
}

void add_draft(const models::MemoryNeed& draft, models::MemoryNeed& all) {
  all.weight_bytes += draft.weight_bytes;
  all.workspace_bytes += draft.workspace_bytes;
  all.kv_bytes_per_block += draft.kv_bytes_per_block;
  all.read_bytes += draft.read_bytes;
}

void plan_draft(const NodeConfig& config, ops::Isa isa, NodePlan& plan) {
  Problems problems;
  check_draft_model(config, plan.info, problems);
  problems.throw_if_any("the draft model cannot be used");
  plan.draft = {.info = models::read_model_info(config.plugins.draft_model),
                .need = {},
                .sequences = std::min(engine::EngineOptions{}.draft_batch, config.schedule.max_batch)};
  models::MemoryNeed& need = plan.draft->need;
  need = models::memory_need(plan.draft->info, draft_options(config, plan, isa));
  need.workspace_bytes += engine::Drafter::logits_bytes(plan.draft->sequences, plan.info.vocab_size);
  const auto place = std::find(plan.local_ranks.begin(), plan.local_ranks.end(), 0);
  PHALANX_CHECK(place != plan.local_ranks.end());
  add_draft(need, plan.needs[static_cast<size_t>(place - plan.local_ranks.begin())]);
}

// What ranks must hold, whoever holds them.
struct Demand {
  int64_t fixed = 0;  // weights and workspaces
  int64_t kv = 0;     // of each rank, at least: one sequence of the greatest length, or npuMemSize
};

Demand demand_of(const NodeConfig& config, const std::vector<models::MemoryNeed>& needs) {
  Demand demand;
  int64_t block = 0;
  for (const models::MemoryNeed& need : needs) {
    demand.fixed += need.weight_bytes + need.workspace_bytes + need.adapter_bytes;
    block = std::max(block, need.kv_bytes_per_block);
  }
  const int64_t sequence_blocks =
      (config.model.max_sequence + config.schedule.cache_block_size - 1) /
      config.schedule.cache_block_size;
  demand.kv = config.model.npu_mem_gb > 0 ? config.model.npu_mem_gb << 30 : sequence_blocks * block;
  return demand;
}

// What `ranks` of the `sharing` ranks on a machine may use of its memory.
int64_t usable_bytes(const NodeConfig& config, int64_t memory_bytes, int ranks, int sharing) {
  return static_cast<int64_t>(static_cast<double>(memory_bytes) * config.npu_memory_fraction *
                              static_cast<double>(ranks) / static_cast<double>(sharing));
}

// The KV cache gets what is left of fraction x memory after weights and workspaces
// (config.json npuMemSize -1), or what npuMemSize says.
void divide_memory(const NodeConfig& config, const HostResources& host, int sharing, bool judge,
                   NodePlan& plan) {
  const int64_t sequence_blocks =
      (config.model.max_sequence + config.schedule.cache_block_size - 1) /
      config.schedule.cache_block_size;
  plan.kv_blocks_wanted = sequence_blocks * config.schedule.max_batch;
  const int local = static_cast<int>(plan.local_ranks.size());
  if (local == 0) return;
  const Demand demand = demand_of(config, plan.needs);
  const int64_t usable = usable_bytes(config, host.memory_bytes, local, sharing);
  if (judge && demand.fixed + local * demand.kv > usable) {
    throw Error(
        Code::kResourceExhausted,
        fmt::format(
            "not enough memory for {}: this node's {} rank{} need {} for weights, workspace and "
            "LoRA adapters and "
            "at least {} each for {}, found {} ({} of {} by {}, times NPU_MEMORY_FRACTION {:.2f}). "
            "Fix: use more nodes or ranks on other machines, lower maxSeqLen, maxPrefillTokens or "
            "npuMemSize, or raise NPU_MEMORY_FRACTION",
            config.model.weight_path, local, local == 1 ? "" : "s", format_bytes(demand.fixed),
            format_bytes(demand.kv),
            config.model.npu_mem_gb > 0
                ? fmt::format("the KV cache that npuMemSize {} asks for", config.model.npu_mem_gb)
                : fmt::format("one sequence of maxSeqLen {}", config.model.max_sequence),
            format_bytes(usable),
            format_bytes(static_cast<int64_t>(static_cast<double>(host.memory_bytes) * local /
                                              sharing)),
            format_bytes(host.memory_bytes), host.memory_source, config.npu_memory_fraction));
  }
  plan.kv_bytes_per_rank = config.model.npu_mem_gb > 0 ? config.model.npu_mem_gb << 30
                                                       : std::max<int64_t>(0, usable - demand.fixed) / local;
}

// `before`: of the same node; its cores stay where the number of ranks does not grow.
void cut(const NodeConfig& config, const HostResources& host, const cluster::Seating& seats,
         const NodePlan* before, bool judge, NodePlan& plan) {
  plan.seats = seats;
  plan.weights = cluster::weights_of(seats);
  plan.layout = models::plan_layout(plan.info, plan.weights, moe_ep_of(config, seats.size()));
  plan.local_ranks = cluster::ranks_of(seats, config.own_server);
  const int sharing = ranks_on_this_machine(config, seats);
  const size_t local = plan.local_ranks.size();
  if (before != nullptr && local <= before->local_ranks.size()) {
    plan.cores = before->cores;
    if (!plan.cores.cpus.empty())
      plan.cores.cpus.resize(local * static_cast<size_t>(plan.cores.threads_per_rank));
  } else if (local > 0) {
    plan.cores = plan_cores({.ranks = static_cast<int>(local),
                             .sharing = sharing,
                             .threads_per_rank = config.threads_per_rank,
                             .cpus = config.cpus,
                             .lease_folder = default_lease_folder()},
                            host, read_topology(host.cpus));
  }
  plan.threads_per_rank = plan.cores.threads_per_rank;
  const ops::Isa isa = ops::choose_isa();
  plan.needs.clear();
  for (const int rank : plan.local_ranks)
    plan.needs.push_back(models::memory_need(plan.info, model_options(config, plan, rank, isa)));
  if (runs_draft_model(config)) plan_draft(config, isa, plan);
  divide_memory(config, host, sharing, judge, plan);
}

}  // namespace

NodePlan plan_node(const NodeConfig& config, const HostResources& host) {
  NodePlan plan;
  plan.info = models::read_model_info(config.model.weight_path);
  models::check_checkpoint(config.model.weight_path);
  plan.adapters = plan_adapters(config.model, plan.info);
  // Prompts longer than this are prefilled in pieces; the result does not depend on it.
  constexpr int64_t kMostStepTokens = 2048;
  plan.max_step_tokens = std::max(std::min(config.schedule.max_prefill_tokens, kMostStepTokens),
                                  config.schedule.max_batch);
  // Log-probabilities of prompts take a row of logits per token.
  constexpr int64_t kLeastStepRows = 32;
  plan.max_step_rows =
      std::max(config.schedule.max_batch, std::min(plan.max_step_tokens, kLeastStepRows));
  cut(config, host, cluster::table_seating(config.table), nullptr,
      !config.table.has_auto_weights(), plan);
  return plan;
}

NodePlan replan_node(const NodeConfig& config, const HostResources& host, const NodePlan& before,
                     const cluster::Seating& seats) {
  NodePlan plan = before;
  cut(config, host, seats, &before, true, plan);
  return plan;
}

std::optional<cluster::Misfit> find_misfit(const NodeConfig& config, const NodePlan& plan,
                                           const cluster::Seating& seats,
                                           const std::vector<cluster::NodeOffer>& offers) {
  const int sharing = ranks_on_this_machine(config, seats);
  NodePlan other = plan;
  other.weights = cluster::weights_of(seats);
  const ops::Isa isa = ops::choose_isa();
  for (size_t s = 0; s < offers.size(); ++s) {
    const std::vector<int> ranks = cluster::ranks_of(seats, static_cast<int>(s));
    if (ranks.empty()) continue;
    std::vector<models::MemoryNeed> needs;
    try {
      for (const int rank : ranks)
        needs.push_back(models::memory_need(plan.info, model_options(config, other, rank, isa)));
    } catch (const Error& e) {
      return cluster::Misfit{.server = static_cast<int>(s), .reason = e.what()};
    }
    if (plan.draft && ranks.front() == 0) add_draft(plan.draft->need, needs.front());
    const std::string& address = config.table.servers[s].address();
    const bool shared = static_cast<int>(s) == config.own_server || net::is_local(address);
    const auto count = static_cast<int>(ranks.size());
    const Demand demand = demand_of(config, needs);
    const int64_t usable =
        usable_bytes(config, offers[s].memory_bytes, count, shared ? sharing : count);
    if (demand.fixed + count * demand.kv <= usable) continue;
    return cluster::Misfit{
        .server = static_cast<int>(s),
        .reason = fmt::format("node {} would need {} for weights and workspace and at least {} for "
                              "the KV cache of each of its {} rank{}, and has {} for it",
                              address, format_bytes(demand.fixed), format_bytes(demand.kv), count,
                              count == 1 ? "" : "s", format_bytes(usable))};
  }
  return std::nullopt;
}

std::string layout_table(const NodeConfig& config, const NodePlan& plan) {
  const auto range = [](tensor::Range r) {
    return r.size() == 0 ? std::string("-") : fmt::format("{}-{}", r.begin, r.end - 1);
  };
  std::string text =
      fmt::format("{:>5}  {:<22} {:>9} {:>9} {:>12} {:>12} {:>14}\n", "rank", "node", "heads",
                  "kv heads", "hidden rows", "mlp rows", "vocabulary");
  for (size_t rank = 0; rank < plan.layout.size(); ++rank) {
    const models::RankLayout& l = plan.layout[rank];
    const int server = plan.seats[rank].server;
    text += fmt::format("{:>5}  {:<22} {:>9} {:>9} {:>12} {:>12} {:>14}\n", rank,
                        config.table.servers[static_cast<size_t>(server)].address(),
                        range(l.query_heads), range(l.kv_heads), range(l.hidden_rows),
                        range(l.mlp_rows), range(l.vocab_rows));
  }
  return text;
}

std::vector<std::string> format_report(const NodeConfig& config, const NodePlan& plan) {
  std::vector<std::string> lines;
  if (plan.info.formats != nullptr)
    lines.push_back(fmt::format("number formats ({}): {}; other layers {}",
                                plan.info.formats->source, plan.info.formats->summary(),
                                tensor::dtype_name(plan.info.dtype)));
  const int64_t tokens = config.schedule.cache_block_size;
  int64_t block = 0;
  for (size_t i = 0; i < plan.needs.size(); ++i) {
    const bool drafts = plan.draft && plan.local_ranks[i] == 0;
    block = std::max(block, plan.needs[i].kv_bytes_per_block -
                                (drafts ? plan.draft->need.kv_bytes_per_block : 0));
  }
  lines.push_back(fmt::format("KV cache: {}, {} bytes per token and rank",
                              models::kv_format_text(plan.info, config.model.kv),
                              block / tokens));
  if (plan.draft) {
    const DraftPlan& draft = *plan.draft;
    lines.push_back(fmt::format(
        "draft model {}: {}, {} layers, whole on rank 0: weights {}, workspace {}, KV cache {} bytes "
        "per token; up to {} guesses per sequence and step, for up to {} sequences",
        config.plugins.draft_model, draft.info.model_type, draft.info.num_layers,
        format_bytes(draft.need.weight_bytes), format_bytes(draft.need.workspace_bytes),
        draft.need.kv_bytes_per_block / tokens, config.plugins.draft_tokens, draft.sequences));
  }
  return lines;
}

cluster::JoinFacts join_facts(const NodeConfig& config, const NodePlan& plan) {
  const std::string& dir = config.model.weight_path;
  const BuildIdentity& build = build_identity();
  cluster::JoinFacts facts{{"numerics version", std::to_string(build.numerics_version)},
                           {"wire version", std::to_string(build.wire_version)},
                           {"frame version", std::to_string(build.frame_version)},
                           {"rank table", config.table.digest()}};
  for (const auto& [name, value] : shared_settings(config)) facts.emplace_back(name, value);
  facts.insert(facts.end(),
               {{"model type", plan.info.model_type},
                {"model config.json", file_digest(dir + "/config.json")},
                {"generation_config.json", file_digest(dir + "/generation_config.json")},
                {"tokenizer.json", file_digest(dir + "/tokenizer.json")},
                {"weights", weights_digest(dir)}});
  for (const AdapterPlan::Module& module : plan.adapters.modules)
    facts.emplace_back(fmt::format("LoRA adapter {}", module.name), module.digest.substr(0, 16));
  return facts;
}

Node::Node(const NodeConfig& config, const NodePlan& plan, Hooks hooks)
    : config_(config),
      host_(host_resources()),
      hooks_(std::move(hooks)),
      plan_(std::make_shared<const NodePlan>(plan)) {}

Node::~Node() = default;

cluster::NodeOffer Node::offer() const {
  cluster::NodeOffer offer;
  // PHALANX_CPU_ISA narrows what this node offers to the class of the path it names.
  const ops::Isa best = ops::choose_isa();
  for (const ops::Isa isa : ops::available_isas()) {
    if (isa > best) break;
    const std::string name(ops::numeric_class_name(ops::numeric_class_of(isa)));
    if (std::find(offer.numeric_classes.begin(), offer.numeric_classes.end(), name) ==
        offer.numeric_classes.end())
      offer.numeric_classes.push_back(name);
  }
  const HostResources host = host_resources();
  offer.build = build_identity().release;
  offer.memory_bytes = host.memory_bytes;
  offer.cores = host.usable_cores();
  return offer;
}

UniqueFd Node::open_listener(const std::string& device_ip, cluster::RankEndpoint& endpoint) {
  const cluster::Server& own = config_.table.servers[static_cast<size_t>(config_.own_server)];
  const bool own_ip = !device_ip.empty() && net::is_local(device_ip);
  endpoint.address = own_ip ? device_ip : own.address();
  UniqueFd fd = comm::listen_on(endpoint.address, static_cast<uint16_t>(config_.data_port_begin),
                                static_cast<uint16_t>(config_.data_port_end), &endpoint.port);
  log_info("rank {}: data plane listens on {}:{}{}", endpoint.rank, endpoint.address, endpoint.port,
           own_ip || device_ip.empty()
               ? ""
               : fmt::format(" (device_ip {} is no address of this machine)", device_ip));
  return fd;
}

int Node::arena_for(int rank, const std::vector<double>& shares, ops::Isa isa) {
  Arena& arena = arenas_[rank];
  if (!arena.memory.valid() || arena.isa != isa || arena.weights != shares ||
      !weights::arena_is_sealed(arena.memory.get())) {
    arena.memory.reset();
    arena = {.memory = weights::create_arena_memory(), .isa = isa, .weights = shares};
  }
  return arena.memory.get();
}

void Node::end_ranks() {
  std::shared_ptr<RankSupervisor> old;
  {
    const std::lock_guard lock(mutex_);
    old.swap(ranks_);
    channel_.reset();
  }
  if (old) old->end();
  listeners_.clear();
  node_memory_.reset();
  step_channel_.reset();
}

void Node::stand_by() {
  end_ranks();
  hooks_.stand_by();
}

std::vector<cluster::RankEndpoint> Node::prepare(const cluster::Generation& generation) {
  end_ranks();
  if (this->plan()->seats != generation.seats) {
    auto cut_anew = std::make_shared<const NodePlan>(
        replan_node(config_, host_, *this->plan(), generation.seats));
    log_info("the model is cut anew:\n{}", layout_table(config_, *cut_anew));
    const std::lock_guard lock(mutex_);
    plan_ = std::move(cut_anew);
  }
  const std::shared_ptr<const NodePlan> plan = this->plan();
  std::erase_if(arenas_, [&](const auto& entry) {
    const auto& local = plan->local_ranks;
    return entry.first != kDraftArena &&
           std::find(local.begin(), local.end(), entry.first) == local.end();
  });
  generation_ = generation;
  number_ = generation.number;
  ops::Isa isa = ops::choose_isa();
  if (ops::numeric_class_name(ops::numeric_class_of(isa)) != generation.numeric_class) {
    for (const ops::NumericClass c :
         {ops::NumericClass::kFma32, ops::NumericClass::kBf16Dp, ops::NumericClass::kAmx})
      if (ops::numeric_class_name(c) == generation.numeric_class) isa = ops::best_isa_of(c);
  }
  log_info(
      "kernels: {} (numeric class {}{}){}; {}", ops::isa_name(isa),
      ops::numeric_class_name(ops::numeric_class_of(isa)),
      generation.numeric_class == cluster::kMixedClasses ? ", nodes may differ: --isa mixed" : "",
      ops::isa_note(isa), plan->cores.reason);

  const cluster::Server& own = config_.table.servers[static_cast<size_t>(config_.own_server)];
  const bool several_nodes = cluster::servers_of(plan->seats) > 1;
  const size_t local = plan->local_ranks.size();
  if (local > 1) node_memory_ = comm::create_node_memory(static_cast<int>(local));
  std::vector<cluster::RankEndpoint> endpoints;
  std::vector<RankStart> starts;
  for (size_t i = 0; i < local; ++i) {
    const int rank = plan->local_ranks[i];
    RankStart start;
    start.spec.model = model_options(config_, *plan, rank, isa);
    start.spec.vocab_size = plan->info.vocab_size;
    start.spec.max_blocks = plan->kv_blocks_wanted;
    start.spec.generation = generation.number;
    start.spec.threads = plan->threads_per_rank;
    if (!plan->cores.cpus.empty()) {
      const auto first = plan->cores.cpus.begin() + static_cast<std::ptrdiff_t>(i) * plan->threads_per_rank;
      start.spec.cpus.assign(first, first + plan->threads_per_rank);
    }
    start.spec.log_level = static_cast<int>(log_enabled(LogLevel::kDebug)  ? LogLevel::kDebug
                                            : log_enabled(LogLevel::kInfo) ? LogLevel::kInfo
                                            : log_enabled(LogLevel::kWarn) ? LogLevel::kWarn
                                                                           : LogLevel::kError);
    if (rank == 0) {
      if (plan->draft) {
        start.spec.draft = draft_options(config_, *plan, isa);
        start.draft_arena = arena_for(kDraftArena, start.spec.draft->weights, isa);
      }
      start.spec.logits_folder = config_.logits_folder;
      channel_limits_ = start.spec.limits(start.spec.max_blocks);
      step_channel_ = engine::create_step_channel(channel_limits_);
      start.step_channel = step_channel_.get();
    }
    cluster::RankEndpoint endpoint{.rank = rank, .address = own.address(), .port = 0};
    if (several_nodes) {
      listeners_.push_back(open_listener(
          i < own.devices.size() ? own.devices[i].device_ip : std::string(), endpoint));
      start.listener = listeners_.back().get();
    }
    start.node_memory = node_memory_.get();
    start.arena = arena_for(rank, plan->weights, isa);
    endpoints.push_back(endpoint);
    starts.push_back(std::move(start));
  }
  auto ranks = std::make_shared<RankSupervisor>(
      "node " + own.address(), config_.stuck_seconds,
      [this, number = generation.number](const Error& error, bool definite) {
        hooks_.fault(number, error, definite);
      });
  {
    const std::lock_guard lock(mutex_);
    ranks_ = ranks;
  }
  ranks->start(starts, Deadline::in_seconds(kRankAnswerSeconds));
  listeners_.clear();  // the ranks hold them now
  return endpoints;
}

void Node::connect(const std::vector<comm::Member>& members) {
  const double seconds = config_.connect_timeout_s > 0 ? config_.connect_timeout_s : 120;
  (void)ranks_->call({{"op", "connect"},
                      {"members", to_json(members)},
                      {"token", token_to_hex(generation_.token)},
                      {"tls", config_.inter_node.data_plane
                                  ? to_json(config_.inter_node.material->files())
                                  : nlohmann::json()},
                      {"ucx", config_.inter_node.transport == comm::Transport::kUcx},
                      {"connect_seconds", seconds}},
                     "connected", Deadline::in_seconds(seconds + kRankAnswerSeconds));
}

void Node::show_progress(const std::atomic<bool>& done) const {
  const Clock::time_point start = Clock::now();
  std::unique_ptr<Progress> bar;
  int64_t shown = 0;
  for (bool last = false; !last;) {
    last = done;  // looked at first, so that the last round sees every byte
    int64_t read = 0;
    int64_t total = 0;
    for (const RankSupervisor::View& view : ranks_->views()) {
      read += static_cast<int64_t>(view.page->bytes_read.load(std::memory_order_relaxed));
      total += static_cast<int64_t>(view.page->bytes_to_read.load(std::memory_order_relaxed));
    }
    if (!bar && total > 0)
      bar = std::make_unique<Progress>("loading weights", total, ProgressUnit::kBytes,
                                       ProgressOptions{.start = start});
    if (bar && read > shown) bar->advance(read - std::exchange(shown, read));
    if (!last) std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  if (bar) bar->done();
}

cluster::LoadResult Node::load() {
  std::atomic<bool> done{false};
  std::thread progress([&] { show_progress(done); });
  cluster::LoadResult result;
  try {
    for (const nlohmann::json& answer :
         ranks_->call({{"op", "load"}}, "loaded", Deadline::in_seconds(kLoadSeconds)))
      result.bytes_read += answer.at("bytes_read").get<int64_t>();
  } catch (...) {
    done = true;
    progress.join();
    throw;
  }
  done = true;
  progress.join();
  const std::shared_ptr<const NodePlan> plan = this->plan();
  result.kv_blocks = plan->kv_blocks_wanted;
  for (const models::MemoryNeed& need : plan->needs)
    if (need.kv_bytes_per_block > 0)
      result.kv_blocks =
          std::min(result.kv_blocks, plan->kv_bytes_per_rank / need.kv_bytes_per_block);
  return result;
}

void Node::allocate(int64_t kv_blocks) {
  kv_blocks_ = kv_blocks;
  log_info("KV cache: {} blocks of {} tokens on every rank", kv_blocks,
           config_.schedule.cache_block_size);
  if (step_channel_.valid()) {
    auto channel = std::make_shared<engine::StepChannelHead>(step_channel_.get(), channel_limits_);
    const std::lock_guard lock(mutex_);
    channel_ = std::move(channel);
  }
  (void)ranks_->call({{"op", "allocate"}, {"blocks", kv_blocks}}, "allocated",
                     Deadline::in_seconds(kRankAnswerSeconds));
}

void Node::serve() { hooks_.serve(); }

std::vector<cluster::RankReport> Node::reports() {
  std::shared_ptr<RankSupervisor> ranks;
  {
    const std::lock_guard lock(mutex_);
    ranks = ranks_;
  }
  std::vector<cluster::RankReport> reports;
  if (!ranks) return reports;
  for (const RankSupervisor::View& view : ranks->views()) {
    const engine::RankPage& page = *view.page;
    const auto get = [](const std::atomic<uint64_t>& a) { return a.load(std::memory_order_relaxed); };
    reports.push_back({.rank = view.rank,
                       .pid = view.pid,
                       .state = view.state == "allocated" ? "serving" : view.state,
                       .counters = {{"generation", get(page.generation)},
                                    {"step", get(page.step)},
                                    {"steps_done", get(page.steps_done)},
                                    {"tokens_done", get(page.tokens_done)},
                                    {"compute_ns", get(page.compute_ns)},
                                    {"transfer_ns", get(page.transfer_ns)},
                                    {"wait_ns", get(page.wait_ns)},
                                    {"bytes_sent", get(page.bytes_sent)},
                                    {"bytes_received", get(page.bytes_received)},
                                    {"bytes_shared", get(page.bytes_shared)},
                                    {"bytes_read", get(page.bytes_read)},
                                    {"bytes_to_read", get(page.bytes_to_read)},
                                    {"weight_bytes", get(page.weight_bytes)},
                                    {"kv_bytes", get(page.kv_bytes)}}});
  }
  return reports;
}

void Node::abort(const std::string& reason) noexcept {
  std::shared_ptr<RankSupervisor> ranks;
  std::shared_ptr<engine::StepChannelHead> channel;
  {
    const std::lock_guard lock(mutex_);
    ranks = ranks_;
    channel = channel_;
  }
  if (channel) channel->abort(reason);
  if (ranks) ranks->abort(reason);
}

std::shared_ptr<engine::StepChannelHead> Node::channel() const {
  const std::lock_guard lock(mutex_);
  PHALANX_CHECK(channel_ != nullptr);
  return channel_;
}

std::shared_ptr<const NodePlan> Node::plan() const {
  const std::lock_guard lock(mutex_);
  return plan_;
}

bool Node::wait_ranks_stopped(Deadline deadline) {
  return ranks_ == nullptr || ranks_->wait_stopped(deadline);
}

}  // namespace phalanx::apps
