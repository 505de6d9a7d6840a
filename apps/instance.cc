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

#include "phalanx/base/log.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

constexpr double kDrainSeconds = 3;     // running requests may still finish
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

json range_json(tensor::Range r) { return json::array({r.begin, r.end}); }

}  // namespace

struct Instance::State {
  State(const NodeConfig& c, const NodePlan& p)
      : config(c),
        plan(p),
        node(config, plan,
             {.serve = [this] { serve(); }, .fault = [this](const Error& e) { local_fault(e); }}) {}

  const NodeConfig& config;
  const NodePlan& plan;
  Node node;
  std::unique_ptr<cluster::Coordinator> coordinator;  // master
  std::unique_ptr<cluster::Participant> participant;  // slave
  std::unique_ptr<engine::ChannelExecutor> executor;  // master
  std::unique_ptr<engine::Engine> engine;             // master
  std::unique_ptr<Head> head;                         // master
  std::string success_line;

  mutable std::mutex mutex;
  std::condition_variable changed;
  bool serving = false;
  bool stopping = false;
  std::string stop_reason;
  std::optional<Error> failure;
  std::vector<std::string> lost;

  [[nodiscard]] bool master() const { return config.own_server == config.table.master(); }
  [[nodiscard]] const std::string& own_address() const {
    return config.table.servers[static_cast<size_t>(config.own_server)].address();
  }

  void start_engine() {
    const ScheduleConfig& s = config.schedule;
    executor = std::make_unique<engine::ChannelExecutor>(node.channel());
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
                              .draft_most = config.plugins.lookup_most,
                              .draft_least = config.plugins.lookup_least,
                              .generation = node.generation()},
        *executor);
    engine->on_failure([this](const Error& error) {
      // The supervisors know better who died; give their word a moment before taking this one.
      std::unique_lock lock(mutex);
      changed.wait_for(lock, std::chrono::milliseconds(300),
                       [this] { return failure.has_value() || stopping; });
      if (failure || stopping) return;
      lock.unlock();
      set_failure(own_address(), error, false);
    });
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
    engine::GenerateRequest request{.id = "warm-up", .prompt = {0}};
    request.sampling.temperature = 0;
    request.sampling.max_tokens = 1;
    std::string detail;
    if (engine->submit(std::move(request), waiter, &detail) != engine::SubmitResult::kAccepted)
      throw Error(Code::kInternal, "the warm-up request was not accepted: " + detail);
    std::unique_lock lock(waiter->mutex);
    if (!waiter->done.wait_for(lock, std::chrono::seconds(120),
                               [&] { return waiter->last.has_value(); }))
      throw Error(Code::kDeadlineExceeded, "the warm-up step did not end within 120 s");
    if (waiter->last->error) throw *waiter->last->error;
  }

  void serve() {
    if (master()) {
      start_engine();
      warm_up();
      if (head) head->open(*engine);
    }
    {
      const std::lock_guard lock(mutex);
      serving = true;
    }
    if (!success_line.empty()) {
      std::puts(success_line.c_str());
      std::fflush(stdout);
    }
    log_info("{}", success_line.empty() ? "the instance is ready" : success_line);
  }

  void local_fault(const Error& error) {
    if (coordinator) coordinator->report_local_fault(error);
    if (participant) participant->report_local_fault(error);
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
    if (coordinator && !is_serving()) coordinator->stop(reason, Deadline::in_seconds(kLeaveSeconds));
  }

  bool is_serving() const {
    const std::lock_guard lock(mutex);
    return serving;
  }

  int run_master(const cluster::ControlOptions& options) {
    coordinator = std::make_unique<cluster::Coordinator>(options, node);
    coordinator->on_loss([this](const std::string& address, const Error& error) {
      set_failure(address, error, address != own_address());
    });
    coordinator->start();
    {
      std::unique_lock lock(mutex);
      changed.wait(lock, [this] { return stopping || failure.has_value(); });
    }
    if (failure) {
      close_head(Deadline::in_seconds(1));  // let the errors reach the clients
      coordinator->fail(*failure, Deadline::in_seconds(kLeaveSeconds));
      return 1;
    }
    if (!engine->drain(Deadline::in_seconds(kDrainSeconds)))
      engine->end_requests(Error(Code::kUnavailable, "the service is stopping: " + stop_reason));
    close_head(Deadline::in_seconds(1));
    engine.reset();
    stop_ranks();
    coordinator->stop(stop_reason, Deadline::in_seconds(kLeaveSeconds));
    return node.wait_ranks_stopped(Deadline::in_seconds(kLeaveSeconds)) ? 0 : 1;
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
      node.channel().send(writer.finish());
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
void Instance::set_success_line(std::string line) { state_->success_line = std::move(line); }
bool Instance::is_master() const { return state_->master(); }
void Instance::stop(const std::string& reason) { state_->request_stop(reason); }

int Instance::run() {
  const SignalWatch signals([this](int signal) {
    state_->request_stop(signal == SIGTERM ? "SIGTERM" : "SIGINT");
  });
  const cluster::ControlOptions options{
      .table = state_->config.table,
      .own_server = state_->config.own_server,
      .port = static_cast<uint16_t>(state_->config.backend.multi_nodes_port),
      .tls = state_->config.inter_node.material,
      .facts = join_facts(state_->config, state_->plan),
      .offer = state_->node.offer(),
      .join_seconds = state_->config.connect_timeout_s};
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
    view.lost = state_->lost;
  }
  if (state_->coordinator) view.nodes = state_->coordinator->nodes();
  return view;
}

std::string Instance::status_json() const {
  const State& s = *state_;
  json ranks = json::array();
  json nodes = json::array();
  for (const cluster::NodeView& node : view().nodes) {
    nodes.push_back({{"address", node.address},
                     {"state", std::string(cluster::node_state_name(node.state))},
                     {"last_contact_seconds", node.last_contact_seconds},
                     {"cores", node.offer.cores},
                     {"memory_bytes", node.offer.memory_bytes}});
    for (const cluster::RankReport& report : node.ranks) {
      const models::RankLayout& l = s.plan.layout[static_cast<size_t>(report.rank)];
      json rank = report.counters;
      rank.update({{"rank", report.rank},
                   {"node", node.address},
                   {"pid", report.pid},
                   {"state", report.state},
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
              {"draft_tokens", e.draft_tokens},
              {"accepted_draft_tokens", e.accepted_draft_tokens}};
  }
  json failure = nullptr;
  if (const auto found = view().failure) failure = found->what();
  return json{{"generation", s.node.generation()},
              {"world_size", s.config.table.world_size},
              {"nodes", nodes},
              {"ranks", ranks},
              {"engine", engine},
              {"failure", failure}}
      .dump();
}

}  // namespace phalanx::apps
