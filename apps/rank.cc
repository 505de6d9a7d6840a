#include "apps/rank.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "apps/message_socket.h"
#include "apps/rank_spec.h"
#include "phalanx/base/error.h"
#include "phalanx/base/log.h"
#include "phalanx/engine/rank_page.h"
#include "phalanx/engine/worker.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

bool is_open(int fd) { return ::fcntl(fd, F_GETFD) != -1; }

// Reads the supervisor's messages. "abort", or the supervisor's end, wakes the data plane at once,
// whatever the main thread is doing; everything else waits in a queue for it.
class Orders {
 public:
  explicit Orders(MessageSocket& socket) : socket_(socket), reader_([this] { read(); }) {}
  ~Orders() {
    done_ = true;
    reader_.join();
  }

  // Next order of the supervisor. Throws Error(kAborted) after an abort or the supervisor's end.
  json next() {
    std::unique_lock lock(mutex_);
    ready_.wait(lock, [this] { return !queue_.empty() || !aborted_.empty(); });
    if (!aborted_.empty()) throw Error(Code::kAborted, aborted_);
    json order = std::move(queue_.front());
    queue_.pop_front();
    return order;
  }

  // The reason of an abort, "" before there is one.
  [[nodiscard]] std::string aborted() const {
    const std::lock_guard lock(mutex_);
    return aborted_;
  }

  // What an abort has to wake. Null before they are destroyed.
  void set_group(comm::Group* group, engine::StepChannelRank* channel) {
    const std::lock_guard lock(mutex_);
    group_ = group;
    channel_ = channel;
    if (!aborted_.empty()) wake();
  }

 private:
  void read() {
    while (!done_) {
      try {
        std::optional<json> message = socket_.receive(Deadline::in_seconds(0.2));
        if (!message) {
          abort("the node process of this rank ended");
          return;
        }
        if (message->at("op") == "abort") {
          abort(message->at("reason").get<std::string>());
          continue;
        }
        const std::lock_guard lock(mutex_);
        queue_.push_back(std::move(*message));
        ready_.notify_all();
      } catch (const Error& e) {
        if (e.code() == Code::kDeadlineExceeded) continue;
        abort(e.what());
        return;
      } catch (const std::exception& e) {
        abort(e.what());
        return;
      }
    }
  }

  void abort(const std::string& reason) {
    const std::lock_guard lock(mutex_);
    if (aborted_.empty()) aborted_ = reason;
    wake();
    ready_.notify_all();
  }

  void wake() {
    if (group_ != nullptr) group_->abort(aborted_.c_str());
    if (channel_ != nullptr) channel_->abort(aborted_);
  }

  MessageSocket& socket_;
  std::atomic<bool> done_{false};
  mutable std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<json> queue_;
  std::string aborted_;
  comm::Group* group_ = nullptr;
  engine::StepChannelRank* channel_ = nullptr;
  std::thread reader_;  // last: uses the others
};

// Lets go of group and channel before they end.
class GroupLease {
 public:
  explicit GroupLease(Orders& orders) : orders_(orders) {}
  ~GroupLease() { orders_.set_group(nullptr, nullptr); }

 private:
  Orders& orders_;
};

std::unique_ptr<comm::Group> connect(const json& order, const RankSpec& spec,
                                     const Orders& orders) {
  const std::vector<comm::Member> members = members_from_json(order.at("members"));
  if (members.size() == 1) return comm::single_group();
  std::shared_ptr<const net::TlsMaterial> tls;
  if (const json& files = order.at("tls"); !files.is_null()) {
    // Checked by the node process already; a file may have changed since.
    Problems problems;
    Problems warnings;
    tls = net::TlsMaterial::load(tls_files_from_json(files), {.server = true, .client = true},
                                 problems, warnings);
    problems.throw_if_any("TLS of the data plane");
  }
  return comm::form_group({.members = members,
                           .rank = spec.model.rank,
                           .generation = spec.generation,
                           .token = token_from_hex(order.at("token").get<std::string>()),
                           .tls = tls,
                           .transport = order.at("ucx").get<bool>() ? comm::Transport::kUcx
                                                                    : comm::Transport::kTcp,
                           .connect_seconds = order.at("connect_seconds").get<double>(),
                           .abandoned = [&orders] { return orders.aborted(); }},
                          is_open(kListenerFd) ? kListenerFd : -1,
                          is_open(kNodeMemoryFd) ? kNodeMemoryFd : -1);
}

models::MemoryNeed need_of(const models::ModelOptions& options) {
  return models::memory_need(models::read_model_info(options.directory), options);
}

void follow(MessageSocket& socket) {
  Orders orders(socket);
  engine::RankPage* page = engine::map_rank_page(kPageFd);
  RankSpec spec = rank_spec_from_json(orders.next().at("spec"));
  if (is_open(kArenaFd)) spec.model.weight_memory = kArenaFd;
  if (spec.draft && is_open(kDraftArenaFd)) spec.draft->weight_memory = kDraftArenaFd;
  const int rank = spec.model.rank;
  set_up_log({.level = static_cast<LogLevel>(spec.log_level), .tag = fmt::format("rank {}", rank)});
  page->generation.store(spec.generation, std::memory_order_relaxed);
  ThreadPool pool({.threads = spec.threads, .cpus = spec.cpus});
  socket.send({{"event", "started"}});

  std::unique_ptr<comm::Group> formed;
  std::unique_ptr<comm::TracedGroup> group;
  std::unique_ptr<engine::StepChannelRank> channel;
  std::unique_ptr<models::Model> model;
  const std::unique_ptr<comm::Group> alone = comm::single_group();  // of the draft model
  std::unique_ptr<models::Model> draft;
  const GroupLease lease(orders);
  models::MemoryNeed need = need_of(spec.model);
  if (spec.draft) {
    const models::MemoryNeed more = need_of(*spec.draft);
    need.weight_bytes += more.weight_bytes;
    need.kv_bytes_per_block += more.kv_bytes_per_block;
  }
  for (;;) {
    const json order = orders.next();
    const std::string op = order.at("op").get<std::string>();
    if (op == "connect") {
      formed = connect(order, spec, orders);
      group = std::make_unique<comm::TracedGroup>(*formed);
      if (rank == 0)
        channel = std::make_unique<engine::StepChannelRank>(kStepChannelFd, spec.limits(spec.max_blocks));
      orders.set_group(group.get(), channel.get());
      socket.send({{"event", "connected"}});
    } else if (op == "load") {
      models::LoadStats stats;
      const auto load = [&](const models::ModelOptions& options, comm::Group& ranks) {
        const int64_t before = stats.bytes_read;
        auto loaded = models::load_model(options, ranks, pool, [&](int64_t done, int64_t total) {
          page->bytes_read.store(static_cast<uint64_t>(before + done), std::memory_order_relaxed);
          page->bytes_to_read.store(static_cast<uint64_t>(before + total), std::memory_order_relaxed);
          page->heartbeat.fetch_add(1, std::memory_order_relaxed);
        });
        stats.bytes_read += loaded->load_stats().bytes_read;
        stats.tensors += loaded->load_stats().tensors;
        stats.seconds += loaded->load_stats().seconds;
        return loaded;
      };
      model = load(spec.model, *group);
      if (spec.draft) draft = load(*spec.draft, *alone);
      page->weight_bytes.store(static_cast<uint64_t>(need.weight_bytes), std::memory_order_relaxed);
      page->bytes_read.store(static_cast<uint64_t>(stats.bytes_read), std::memory_order_relaxed);
      socket.send({{"event", "loaded"},
                   {"bytes_read", stats.bytes_read},
                   {"tensors", stats.tensors},
                   {"seconds", stats.seconds}});
    } else if (op == "allocate") {
      const int64_t blocks = order.at("blocks").get<int64_t>();
      model->allocate_kv(blocks);
      std::optional<engine::Drafter> drafter;
      if (draft) {
        draft->allocate_kv(blocks);
        drafter.emplace(*draft, spec.limits(blocks));
      }
      page->kv_bytes.store(static_cast<uint64_t>(blocks * need.kv_bytes_per_block),
                           std::memory_order_relaxed);
      socket.send({{"event", "allocated"}});
      engine::run_worker({.generation = spec.generation,
                          .limits = spec.limits(blocks),
                          .logits_folder = spec.logits_folder},
                         *model, *group, channel.get(), page, drafter ? &*drafter : nullptr);
      return;
    } else {
      throw Error(Code::kInternal, fmt::format("unknown order '{}' from the node process", op));
    }
  }
}

}  // namespace

int rank_main() {
  // The node process ends its ranks in order, and its death closes their socket; this is for a rank
  // that no longer looks at its socket. The node's spawning thread lives as long as the node.
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  comm::prepare_environment_for_ucx();  // while there is one thread
  ::signal(SIGPIPE, SIG_IGN);
  ::signal(SIGINT, SIG_IGN);  // a terminal's Ctrl-C reaches the whole group; the node decides
  ::signal(SIGTERM, SIG_IGN);
  for (int fd = kControlFd; fd <= kLastRankFd; ++fd)
    if (is_open(fd)) ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  if (!is_open(kControlFd) || !is_open(kPageFd)) {
    fmt::print(stderr,
               "phalanx: 'phalanx rank' is started by a node process, not by hand. Fix: use "
               "'phalanx serve' or 'phalanx run'\n");
    return 2;
  }
  MessageSocket socket{UniqueFd(kControlFd)};
  try {
    follow(socket);
    socket.send({{"event", "stopped"}});
    return 0;
  } catch (const std::exception& e) {
    const Error* error = dynamic_cast<const Error*>(&e);
    const Code code = error != nullptr ? error->code() : Code::kInternal;
    try {
      socket.send({{"event", "error"}, {"code", static_cast<int>(code)}, {"message", e.what()}});
    } catch (const std::exception&) {
      // The supervisor is gone; it has seen this rank's end by its pidfd.
    }
    return 1;
  }
}

}  // namespace phalanx::apps
