#include "apps/instance.h"

#include <fmt/format.h>
#include <pthread.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "apps/doctor_node.h"
#include "phalanx/base/log.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

constexpr double kWarmUpSeconds = 120;
constexpr double kMeasureSeconds = 0.2; // of memory bandwidth, for weights
constexpr double kIdlePlanSeconds = 1;  // so that a cut link is found while nothing runs
constexpr double kSuspendSeconds = 10;  // for the engine to let go of a lost generation
// Generations in a row that gave no token, over at least so long: the work is at fault, not the machine.
constexpr int kMostFruitless = 10;
constexpr double kFruitlessSeconds = 30;
constexpr double kStepEndSeconds = 1;   // for the step being computed when requests are ended
constexpr double kAnswerSeconds = 3;    // for the answers of a stop to reach the clients
constexpr double kLeaveSeconds = 1.5;   // for ranks and nodes to leave afterwards

sigset_t stop_signals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGTERM);
  return set;
}

// Calls back from its own thread when a stop signal arrives.
class SignalWatch {
 public:
  explicit SignalWatch(std::function<void(int)> callback) : callback_(std::move(callback)) {
    const sigset_t set = stop_signals();
    signals_.reset(::signalfd(-1, &set, SFD_CLOEXEC));
    end_.reset(::eventfd(0, EFD_CLOEXEC));
    thread_ = std::thread([this] { watch(); });
  }
  ~SignalWatch() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = ::write(end_.get(), &one, sizeof one);
    thread_.join();
  }

 private:
  void watch() {
    for (;;) {
      pollfd fds[] = {{signals_.get(), POLLIN, 0}, {end_.get(), POLLIN, 0}};
      ::poll(fds, 2, -1);
      if (fds[1].revents != 0) return;
      signalfd_siginfo info{};
      if (fds[0].revents != 0 && ::read(signals_.get(), &info, sizeof info) == sizeof info)
        callback_(static_cast<int>(info.ssi_signo));
    }
  }

  std::function<void(int)> callback_;
  UniqueFd signals_;
  UniqueFd end_;
  std::thread thread_;
};

// Whether this node has ranks among those of several nodes that get weights by measurement.
bool needs_bandwidth(const NodeConfig& config) {
  const cluster::Seating seats = cluster::table_seating(config.table);
  return config.table.has_auto_weights() && cluster::servers_of(seats) > 1 &&
         cluster::is_seated(seats, config.own_server);
}

double measured_bandwidth() {
  const MemorySpeed speed = measure_memory(kMeasureSeconds);
  if (!speed.problem.empty())
    throw Error(Code::kFailedPrecondition,
                fmt::format("the rank table's \"weight\": \"auto\" needs this node's memory "
                            "bandwidth: {}. Fix: free memory, give numbers as weights, or say the "
                            "figure by PHALANX_MEMORY_GBPS",
                            speed.problem));
  log_info("memory bandwidth of this node: {:.1f} GB/s", speed.read_bytes_per_s / 1e9);
  return speed.read_bytes_per_s;
}

json range_json(tensor::Range r) { return json::array({r.begin, r.end}); }

}  // namespace

struct Instance::State {
  State(const NodeConfig& c, const NodePlan& p)
      : config(c),
        plan(p),
        node(config, plan,
             {.serve = [this] { serve(); },
              .stand_by = [this] { announce("this node stands by"); },
              .fault =
                  [this](uint64_t generation, const Error& e, bool definite) {
                    local_fault(generation, e, definite);
                  }}) {}

  // What the engine computes through, in one generation.
  struct Attachment {
    explicit Attachment(std::shared_ptr<engine::StepChannelHead> c)
        : channel(std::move(c)), executor(*channel) {}
    std::shared_ptr<engine::StepChannelHead> channel;
    engine::ChannelExecutor executor;
  };

  const NodeConfig& config;
  const NodePlan& plan;
  Node node;
  std::unique_ptr<cluster::Coordinator> coordinator;  // master
  std::unique_ptr<cluster::Participant> participant;  // slave
  std::unique_ptr<Attachment> attachment;             // master
  std::unique_ptr<Attachment> former;                 // somebody may still be aborting it
  std::unique_ptr<engine::Engine> engine;             // master
  std::unique_ptr<Head> head;                         // master
  bool opened = false;                                // the head; main thread
  std::string success_line;
  std::function<std::shared_ptr<const net::TlsMaterial>()> renewed_tls;
  bool mixed_classes = false;

  mutable std::mutex mutex;
  std::condition_variable changed;
  bool serving = false;
  bool announced = false;              // the success line was printed
  bool stopping = false;
  std::string stop_reason;
  std::optional<Error> failure;
  std::optional<Error> loss;           // of the present generation; it is recovered from
  Clock::time_point lost_at;
  uint64_t tokens_at_loss = 0;         // main thread
  int fruitless_generations = 0;       // main thread
  Clock::time_point fruitful;          // the first loss since tokens came last; main thread
  uint64_t recoveries = 0;
  double last_recovery_seconds = 0;
  std::string last_loss;
  std::vector<std::string> lost;

  [[nodiscard]] bool master() const { return config.own_server == config.table.master(); }
  [[nodiscard]] const std::string& own_address() const {
    return config.table.servers[static_cast<size_t>(config.own_server)].address();
  }

  [[nodiscard]] std::vector<std::string> rank_places() const {
    std::vector<std::string> places;
    for (int rank = 0; rank < config.table.world_size; ++rank) {
      const auto server = static_cast<size_t>(config.table.server_of_rank(rank));
      places.push_back(fmt::format("rank {} (node {})", rank, config.table.servers[server].address()));
    }
    return places;
  }

  void start_engine() {
    const ScheduleConfig& s = config.schedule;
    attachment = std::make_unique<Attachment>(node.channel());
    engine = std::make_unique<engine::Engine>(
        engine::EngineOptions{.vocab_size = plan.info.vocab_size,
                              .block_size = s.cache_block_size,
                              .blocks = node.kv_blocks(),
                              .max_sequence = config.model.max_sequence,
                              .max_input_tokens = std::min(config.model.max_input_tokens,
                                                           config.model.max_sequence - 1),
                              .max_prefill_tokens = s.max_prefill_tokens,
                              .max_prefill_batch = s.max_prefill_batch,
                              .max_batch = s.max_batch,
                              .max_output_tokens = s.max_output_tokens,
                              .max_step_tokens = plan.max_step_tokens,
                              .max_step_rows = plan.max_step_rows,
                              .max_queue = 3 * config.server.max_link_num,
                              .prefix_cache = config.plugins.prefix_cache,
                              .decode_stretch = config.plugins.chunked_prefill
                                                    ? engine::EngineOptions{}.decode_stretch
                                                    : 0,
                              .draft_tokens = config.plugins.draft_tokens,
                              .draft_model = plan.draft.has_value(),
                              .draft_most = config.plugins.lookup_most,
                              .draft_least = config.plugins.lookup_least,
                              .draft_batch = plan.draft ? plan.draft->sequences
                                                        : engine::EngineOptions{}.draft_batch,
                              .max_adapters = plan.adapters.slots,
                              .rank_places = rank_places(),
                              .generation = node.generation(),
                              .recover = config.recover,
                              .idle_plan_seconds = kIdlePlanSeconds},
        attachment->executor);
    engine->on_failure([this](const Error& error) {
      // The supervisors know better who died; their word replaces this one if it comes soon.
      const auto code = config.recover ? Code::kUnavailable : error.code();
      local_fault(node.generation(), Error(code, error.what()), false);
    });
  }

  void resume_engine() {
    engine->suspend(Deadline::in_seconds(kSuspendSeconds));
    former = std::move(attachment);
    attachment = std::make_unique<Attachment>(node.channel());
    engine->resume(attachment->executor, node.generation(), node.kv_blocks());
  }

  // One token through the real path, so that the first client does not meet a cold start.
  void warm_up() {
    class Waiter final : public engine::EventSink {
     public:
      void on_event(engine::GenerateEvent event) override {
        if (event.finish == engine::FinishReason::kNone) return;
        const std::lock_guard lock(mutex);
        last = std::move(event);
        done.notify_all();
      }
      std::mutex mutex;
      std::condition_variable done;
      std::optional<engine::GenerateEvent> last;
    };
    auto waiter = std::make_shared<Waiter>();
    const std::string id = fmt::format("warm-up-{}", node.generation());
    engine::GenerateRequest request{.id = id, .prompt = {0}};
    request.sampling.temperature = 0;
    request.sampling.max_tokens = 1;
    std::string detail;
    if (engine->submit(std::move(request), waiter, &detail) != engine::SubmitResult::kAccepted)
      throw Error(Code::kInternal, "the warm-up request was not accepted: " + detail);
    const Deadline deadline = Deadline::in_seconds(kWarmUpSeconds);
    std::unique_lock lock(waiter->mutex);
    while (!waiter->done.wait_for(lock, std::chrono::milliseconds(50),
                                  [&] { return waiter->last.has_value(); })) {
      if (!engine->suspended() && !deadline.passed()) continue;
      lock.unlock();
      engine->cancel(id);
      throw Error(Code::kUnavailable,
                  deadline.passed()
                      ? fmt::format("the warm-up step did not end within {} s", kWarmUpSeconds)
                      : "the generation was lost during the warm-up step");
    }
    if (waiter->last->error) throw *waiter->last->error;
  }

  void serve() {
    if (master()) {
      if (engine) {
        resume_engine();
      } else {
        start_engine();
      }
      if (!opened) {
        load_adapters(*engine, plan.adapters);
        warm_up();
        if (head) head->open(*engine);
        opened = true;
      }
    }
    bool again = false;
    {
      const std::lock_guard lock(mutex);
      again = std::exchange(serving, true);
    }
    announce(again || announced ? fmt::format("serving again in generation {}", node.generation())
                                : success_line.empty() ? "the instance is ready" : success_line);
  }

  // The success line goes to stdout once, also on a spare.
  void announce(const std::string& line) {
    {
      const std::lock_guard lock(mutex);
      if (!std::exchange(announced, true) && !success_line.empty()) {
        std::puts(success_line.c_str());
        std::fflush(stdout);
      }
    }
    log_info("{}", line);
  }

  void local_fault(uint64_t generation, const Error& error, bool definite) {
    if (coordinator) coordinator->report_local_fault(generation, error, definite);
    if (participant) participant->report_local_fault(generation, error, definite);
  }

  void set_loss(const std::string& address, const Error& error) {
    const std::lock_guard lock(mutex);
    if (failure) return;
    const std::string name = fmt::format("node {}", address);
    const std::string text = error.what();
    loss = Error(error.code(), text.starts_with(name) ? text : name + ": " + text);
    lost_at = Clock::now();
    if (address != own_address()) lost.push_back(address);
    log_error("generation {} is lost: {}", node.generation(), loss->what());
    changed.notify_all();
  }

  // Whether the same work brings every generation down.
  void check_progress() {
    const engine::EngineStats stats = engine->stats();
    const bool fruitless =
        stats.running + stats.waiting > 0 && stats.output_tokens == tokens_at_loss;
    tokens_at_loss = stats.output_tokens;
    if (!fruitless || fruitless_generations == 0) fruitful = Clock::now();
    fruitless_generations = fruitless ? fruitless_generations + 1 : 0;
    const std::chrono::duration<double> without = Clock::now() - fruitful;
    if (fruitless_generations < kMostFruitless || without.count() < kFruitlessSeconds) return;
    throw Error(Code::kInternal,
                fmt::format("the instance ended its {}th generation in a row without a token",
                            fruitless_generations));
  }

  // Forms the next generation; requests go on where they were.
  void recover() {
    engine->suspend(Deadline::in_seconds(kSuspendSeconds));
    check_progress();
    coordinator->start();
    const std::lock_guard lock(mutex);
    ++recoveries;
    last_recovery_seconds = std::chrono::duration<double>(Clock::now() - lost_at).count();
    last_loss = loss->what();
    log_info("recovered after {:.2f} s from: {}", last_recovery_seconds, last_loss);
    loss.reset();
    lost.clear();
    changed.notify_all();
  }

  // Ends a recovery that has not succeeded by then, so that a stop does not wait for it.
  void bound_recovery(Deadline deadline) {
    {
      std::unique_lock lock(mutex);
      if (changed.wait_until(lock, deadline.when(), [this] { return !loss || failure; })) return;
    }
    coordinator->stop(stop_reason, Deadline::in_seconds(kLeaveSeconds));
  }

  // No new requests; running ones end, also through a loss. False when the time is over.
  bool drain(Deadline deadline) {
    constexpr double kSlice = 0.05;
    while (!engine->drain(Deadline(std::min(deadline.when(), Deadline::in_seconds(kSlice).when())))) {
      if (deadline.passed()) return false;
      {
        const std::lock_guard lock(mutex);
        if (!loss) continue;
      }
      std::thread bound([&] { bound_recovery(deadline); });
      bool recovered = true;
      try {
        recover();
      } catch (const Error& error) {
        log_warn("not recovered while stopping: {}", error.what());
        recovered = false;
        const std::lock_guard lock(mutex);
        failure = error;
        changed.notify_all();
      }
      bound.join();
      if (!recovered) return false;
    }
    return true;
  }

  void set_failure(const std::string& address, const Error& error, bool node_lost) {
    {
      const std::lock_guard lock(mutex);
      if (failure || stopping) return;
      const std::string name = fmt::format("node {}", address);
      const std::string text = error.what();
      failure = Error(error.code(), text.starts_with(name) ? text : name + ": " + text);
      if (node_lost) lost.push_back(address);
      log_error("the instance failed: {}", failure->what());
    }
    // Running requests first: their clients wait.
    if (engine) engine->fail(*failure);
    if (head) head->fail(*failure);
    node.abort(failure->what());
    changed.notify_all();
  }

  void request_stop(const std::string& reason) {
    {
      const std::lock_guard lock(mutex);
      if (stopping) return;
      stopping = true;
      stop_reason = reason;
    }
    log_info("stopping: {}", reason);
    changed.notify_all();
    if (participant) participant->leave(reason);
    if (!coordinator) return;
    if (is_serving()) {
      bound_recovery(Deadline::in_seconds(config.drain_seconds));
    } else {
      coordinator->stop(reason, Deadline::in_seconds(kLeaveSeconds));
    }
  }

  bool is_serving() const {
    const std::lock_guard lock(mutex);
    return serving;
  }

  bool lost_now() const {
    const std::lock_guard lock(mutex);
    return loss.has_value();
  }

  int run_master(const cluster::ControlOptions& options) {
    coordinator = std::make_unique<cluster::Coordinator>(options, node);
    coordinator->on_loss([this](const std::string& address, const Error& error) {
      if (config.recover) set_loss(address, error);
      else set_failure(address, error, address != own_address());
    });
    coordinator->start();
    bool in_order = true;  // the ranks can be told to stop
    for (;;) {
      std::unique_lock lock(mutex);
      changed.wait(lock, [this] { return stopping || failure || loss; });
      if (stopping || failure) {
        in_order = !loss;
        break;
      }
      lock.unlock();
      try {
        recover();
      } catch (const Error& error) {
        lock.lock();
        if (stopping) {
          in_order = false;
          break;
        }
        const std::string text =
            fmt::format("{}; the instance did not recover: {}", loss->what(), error.what());
        lock.unlock();
        set_failure(own_address(), Error(Code::kUnavailable, text), false);
      }
    }
    if (failure) {
      close_head(Deadline::in_seconds(1));  // let the errors reach the clients
      coordinator->fail(*failure, Deadline::in_seconds(kLeaveSeconds));
      return 1;
    }
    if (!in_order || !drain(Deadline::in_seconds(config.drain_seconds)))
      in_order = end_requests(Error(Code::kCancelled, "the service is stopping: " + stop_reason)) && in_order;
    in_order = in_order && !lost_now();
    close_head(Deadline::in_seconds(kAnswerSeconds));
    engine.reset();
    if (!in_order) {
      coordinator->stop(stop_reason, Deadline::in_seconds(kLeaveSeconds));
      return 0;
    }
    stop_ranks();
    coordinator->stop(stop_reason, Deadline::in_seconds(kLeaveSeconds));
    return node.wait_ranks_stopped(Deadline::in_seconds(kLeaveSeconds)) ? 0 : 1;
  }

  // Every request gets its answer, at once: a step that takes long is not waited for. False if one was
  // broken off, so that the ranks cannot be told to stop.
  bool end_requests(const Error& error) {
    engine->end_requests(error);
    if (engine->drain(Deadline::in_seconds(kStepEndSeconds))) return true;
    engine->fail(error);
    (void)engine->drain(Deadline::in_seconds(kAnswerSeconds));
    return false;
  }

  // The head holds on to the engine, so it goes first.
  void close_head(Deadline deadline) {
    if (!head) return;
    head->drain(deadline);
    head.reset();
  }

  // The last plan: every rank leaves its loop.
  void stop_ranks() {
    engine::StepPlanWriter writer;
    writer.begin(engine::StepKind::kStop, node.generation(), last_step() + 1);
    try {
      node.channel()->send(writer.finish());
    } catch (const Error& e) {
      log_warn("the stop plan could not be sent: {}", e.what());
    }
  }

  uint64_t last_step() {
    uint64_t step = 0;
    for (const cluster::RankReport& report : node.reports())
      if (report.rank == 0) step = report.counters.at("step");
    return step;
  }

  int run_slave(const cluster::ControlOptions& options) {
    participant = std::make_unique<cluster::Participant>(options, node);
    participant->run();
    bool left_alone = false;
    {
      const std::lock_guard lock(mutex);
      left_alone = stopping;
      stopping = true;
    }
    // When the master stops, rank 0 passes its last plan on and every rank leaves by itself. When
    // this node leaves alone, or nothing ran yet, nobody tells its ranks but this node.
    if (left_alone || !is_serving()) node.abort("this node stops: " + stop_reason);
    node.wait_ranks_stopped(Deadline::in_seconds(kLeaveSeconds));
    return 0;
  }
};

Instance::Instance(const NodeConfig& config, const NodePlan& plan) {
  const sigset_t set = stop_signals();
  ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  state_ = std::make_unique<State>(config, plan);
}

Instance::~Instance() = default;

void Instance::set_head(std::unique_ptr<Head> head) { state_->head = std::move(head); }
void Instance::set_renewed_tls(
    std::function<std::shared_ptr<const net::TlsMaterial>()> renewed) {
  state_->renewed_tls = std::move(renewed);
}
void Instance::set_mixed_classes(bool mixed) { state_->mixed_classes = mixed; }
void Instance::set_success_line(std::string line) { state_->success_line = std::move(line); }
bool Instance::is_master() const { return state_->master(); }
void Instance::stop(const std::string& reason) { state_->request_stop(reason); }

int Instance::run() {
  const SignalWatch signals([this](int signal) {
    state_->request_stop(signal == SIGTERM ? "SIGTERM" : "SIGINT");
  });
  cluster::NodeOffer offer = state_->node.offer();
  if (needs_bandwidth(state_->config)) offer.bytes_per_second = measured_bandwidth();
  cluster::JoinFacts facts = join_facts(state_->config, state_->plan);
  facts.emplace_back("isa", state_->mixed_classes ? "mixed" : "common");
  const cluster::ControlOptions options{
      .table = state_->config.table,
      .own_server = state_->config.own_server,
      .port = static_cast<uint16_t>(state_->config.backend.multi_nodes_port),
      .tls = state_->config.inter_node.material,
      .renewed_tls = state_->renewed_tls,
      .facts = facts,
      .offer = offer,
      .mixed_classes = state_->mixed_classes,
      .join_seconds = state_->config.connect_timeout_s,
      .recover = state_->config.recover,
      .recovery_seconds = state_->config.recovery_seconds,
      .spare_seconds = state_->config.spare_seconds,
      .shrink = state_->config.shrink,
      .misfit = [this](const cluster::Seating& seats,
                       const std::vector<cluster::NodeOffer>& offers) {
        return find_misfit(state_->config, state_->plan, seats, offers);
      }};
  try {
    return is_master() ? state_->run_master(options) : state_->run_slave(options);
  } catch (const Error& e) {
    {
      const std::lock_guard lock(state_->mutex);
      if (state_->stopping) return 0;  // stopped while starting
    }
    state_->node.abort(e.what());
    throw;
  }
}

InstanceView Instance::view() const {
  InstanceView view;
  {
    const std::lock_guard lock(state_->mutex);
    view.serving = state_->serving;
    view.draining = state_->stopping;
    view.failure = state_->failure;
    view.recovering = state_->loss;
    view.lost = state_->lost;
  }
  if (state_->coordinator) view.nodes = state_->coordinator->nodes();
  for (const cluster::NodeView& node : view.nodes)
    if (node.state == cluster::NodeState::kSpare) view.spares.push_back(node.address);
  return view;
}

std::string Instance::status_json() const {
  const State& s = *state_;
  json ranks = json::array();
  json nodes = json::array();
  const std::shared_ptr<const NodePlan> plan = s.node.plan();
  for (const cluster::NodeView& node : view().nodes) {
    nodes.push_back({{"address", node.address},
                     {"state", std::string(cluster::node_state_name(node.state))},
                     {"verdict", node.verdict},
                     {"reason", node.last_reason},
                     {"last_contact_seconds", node.last_contact_seconds},
                     {"build", node.offer.build},
                     {"cores", node.offer.cores},
                     {"numeric_class",
                      node.offer.numeric_classes.empty() ? "" : node.offer.numeric_classes.back()},
                     {"memory_bytes", node.offer.memory_bytes},
                     {"bytes_per_second", node.offer.bytes_per_second},
                     {"spare", node.spare}});
    for (const cluster::RankReport& report : node.ranks) {
      // A node may still tell of a generation with more ranks.
      if (report.rank < 0 || static_cast<size_t>(report.rank) >= plan->layout.size()) continue;
      const models::RankLayout& l = plan->layout[static_cast<size_t>(report.rank)];
      json rank = report.counters;
      rank.update({{"rank", report.rank},
                   {"node", node.address},
                   {"pid", report.pid},
                   {"state", report.state},
                   {"weight", plan->weights[static_cast<size_t>(report.rank)]},
                   {"heads", range_json(l.query_heads)},
                   {"kv_heads", range_json(l.kv_heads)},
                   {"hidden_rows", range_json(l.hidden_rows)},
                   {"mlp_rows", range_json(l.mlp_rows)},
                   {"vocab", range_json(l.vocab_rows)}});
      ranks.push_back(std::move(rank));
    }
  }
  json engine = json::object();
  if (s.engine && is_master()) {
    const engine::EngineStats e = s.engine->stats();
    engine = {{"steps", e.steps},
              {"prompt_tokens", e.prompt_tokens},
              {"cached_tokens", e.cached_tokens},
              {"output_tokens", e.output_tokens},
              {"step_ns", e.step_ns},
              {"compute_ns", e.compute_ns},
              {"communication_ns", e.communication_ns},
              {"overhead_ns", e.overhead_ns},
              {"preemptions", e.preemptions},
              {"running", e.running},
              {"waiting", e.waiting},
              {"blocks_total", e.blocks_total},
              {"blocks_free", e.blocks_free},
              {"received", e.received},
              {"succeeded", e.succeeded},
              {"failed", e.failed},
              {"drafts", e.drafts},
              {"draft_ns", e.draft_ns},
              {"draft_tokens", e.draft_tokens},
              {"accepted_draft_tokens", e.accepted_draft_tokens}};
  }
  json adapters = json::array();
  if (s.engine && is_master())
    for (const auto& adapter : s.engine->adapters())
      adapters.push_back({{"name", adapter.name}, {"path", adapter.path}});
  json failure = nullptr;
  if (const auto found = view().failure) failure = found->what();
  json recovery;
  std::string state;
  {
    const std::lock_guard lock(s.mutex);
    state = s.failure    ? "failed"
            : s.stopping ? "draining"
            : s.loss     ? "recovering"
            : s.serving  ? "serving"
                         : "starting";
    recovery = {{"count", s.recoveries},
                {"last_seconds", s.last_recovery_seconds},
                {"last_loss", s.last_loss},
                {"loss", s.loss ? s.loss->what() : ""}};
  }
  return json{{"generation", s.node.generation()},
              {"state", state},
              {"recovery", recovery},
              {"world_size", plan->seats.size()},
              {"configured_world_size", s.config.table.world_size},
              {"weights_decided", s.config.table.has_auto_weights()},
              {"nodes", nodes},
              {"ranks", ranks},
              {"engine", engine},
              {"adapters", adapters},
              {"failure", failure}}
      .dump();
}

}  // namespace phalanx::apps
