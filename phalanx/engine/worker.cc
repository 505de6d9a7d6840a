#include "phalanx/engine/worker.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "phalanx/base/check.h"
#include "phalanx/base/error.h"
#include "phalanx/engine/adapter_order.h"
#include "phalanx/engine/logits_log.h"

namespace phalanx::engine {

namespace {

class Worker {
 public:
  Worker(const WorkerOptions& options, models::Model& model, comm::TracedGroup& group,
         StepChannelRank* channel, RankPage* page, Drafter* drafter)
      : options_(options),
        model_(model),
        group_(group),
        channel_(channel),
        page_(page),
        drafter_(drafter),
        adapters_(model) {
    PHALANX_CHECK((channel != nullptr) == (group.rank() == 0));
    PHALANX_CHECK(drafter == nullptr || channel != nullptr);
    buffer_.resize(static_cast<size_t>(
        std::max(options.limits.max_plan_bytes(), kFirstPieceBytes)));
    counted_ = group.stats();
    if (channel != nullptr && !options.logits_folder.empty()) {
      log_.emplace(options.logits_folder, options.limits.vocab_size);
    }
    set(&RankPage::generation, options.generation);
  }

  // False after kStop.
  bool step() {
    begin_ns_ = 0;
    plan_.decode(receive(), options_.limits);
    const StepPlanHeader& header = plan_.header();
    if (header.generation != options_.generation) {
      throw Error(Code::kDataLoss, fmt::format("step plan: generation is {}, expected {}",
                                               header.generation, options_.generation));
    }
    const bool stop = header.kind == StepKind::kStop;
    if (!stop && header.step != last_step_ + 1) {
      throw Error(Code::kDataLoss,
                  fmt::format("step plan: step is {}, expected {}", header.step, last_step_ + 1));
    }
    last_step_ = header.step;
    set(&RankPage::step, header.step);
    const bool traced = (header.flags & kTraceStep) != 0;
    if (traced) group_.start();
    if (header.kind == StepKind::kCompute) {
      float* logits = channel_ != nullptr ? channel_->logits() : nullptr;
      model_.forward(plan_.inputs(), logits);
      if (log_) log_->append(plan_, logits);
    }
    if (header.kind == StepKind::kAdapter) follow_order();
    const StepTiming timing = count();
    if (traced) gather_traces(timing);
    if (channel_ != nullptr) channel_->publish(header.generation, header.step, timing);
    return !stop;
  }

  [[nodiscard]] uint64_t last_step() const { return last_step_; }

 private:
  // This step's plan, in buffer_.
  std::span<const std::byte> receive() {
    const std::span<std::byte> buffer(buffer_);
    size_t bytes = 0;
    if (channel_ != nullptr) {
      const auto plan = channel_->wait_plan(Deadline::in_seconds(options_.idle_seconds));
      if (plan.empty()) {
        throw Error(Code::kDeadlineExceeded,
                    fmt::format("the head sent no step plan for {} s", options_.idle_seconds));
      }
      if (plan.size() > buffer.size()) {
        throw Error(Code::kDataLoss, fmt::format("step plan: bytes is {}, expected at most {}",
                                                 plan.size(), buffer.size()));
      }
      begin();
      std::memcpy(buffer.data(), plan.data(), plan.size());
      draft(buffer.first(plan.size()));
      group_.broadcast(buffer.first(kFirstPieceBytes), 0);
    } else {
      group_.broadcast(buffer.first(kFirstPieceBytes), 0);
      begin();  // waiting for work is not waiting for a peer
    }
    // Every rank reads the length from the same bytes, so all take the same branch.
    StepPlanHeader header;
    std::memcpy(&header, buffer.data(), sizeof(header));
    bytes = header.bytes;
    if (bytes < sizeof(header) || bytes > buffer.size()) {
      throw Error(Code::kDataLoss, fmt::format("step plan: bytes is {}, expected {} to {}", bytes,
                                               sizeof(header), buffer.size()));
    }
    if (bytes > kFirstPieceBytes) {
      group_.broadcast(buffer.subspan(kFirstPieceBytes, bytes - kFirstPieceBytes), 0);
    }
    return buffer.first(bytes);
  }

  // Completes the plan with the draft model's guesses, where some are wanted.
  void draft(std::span<std::byte> plan) {
    const std::span<const std::byte> order = channel_->draft_order();
    if (order.empty()) return;
    if (drafter_ == nullptr)
      throw Error(Code::kDataLoss, "step channel: a draft order, and rank 0 has no draft model");
    plan_.decode(plan, options_.limits);
    drafter_->run(order, plan_, plan, channel_->guesses());
    draft_ns_ = now_ns() - begin_ns_;
  }

  void begin() {
    draft_ns_ = 0;
    begin_ns_ = now_ns();
    at_begin_ = group_.stats();
  }

  // Adds this step to the page.
  StepTiming count() {
    const comm::GroupStats now = group_.stats();
    const int64_t total = now_ns() - begin_ns_;
    const auto wait = static_cast<int64_t>(now.wait_ns - at_begin_.wait_ns);
    const auto transfer = static_cast<int64_t>(now.transfer_ns - at_begin_.transfer_ns);
    const int64_t compute = std::max<int64_t>(0, total - wait - transfer);
    add(&RankPage::wait_ns, static_cast<uint64_t>(wait));
    add(&RankPage::transfer_ns, static_cast<uint64_t>(transfer));
    add(&RankPage::compute_ns, static_cast<uint64_t>(compute));
    add(&RankPage::bytes_sent, now.bytes_sent - counted_.bytes_sent);
    add(&RankPage::bytes_received, now.bytes_received - counted_.bytes_received);
    add(&RankPage::bytes_shared, now.bytes_shared - counted_.bytes_shared);
    add(&RankPage::tokens_done, plan_.header().num_tokens);
    add(&RankPage::steps_done, 1);
    add(&RankPage::heartbeat, 1);
    counted_ = now;
    return {.total_ns = total,
            .compute_ns = compute,
            .communication_ns = wait + transfer,
            .draft_ns = draft_ns_};
  }

  void follow_order() {
    const AdapterOrder& order = plan_.order();
    switch (order.act) {
      case AdapterAct::kRead:
        return adapters_.begin(order.slot, std::string(plan_.order_path()));
      case AdapterAct::kDrop:
        return adapters_.drop(order.slot);
      case AdapterAct::kSettle:
        break;
    }
    reports_.resize(static_cast<size_t>(group_.size()));
    reports_[static_cast<size_t>(group_.rank())] = adapters_.report();
    const std::vector<int64_t> bytes(reports_.size(), sizeof(AdapterReport));
    group_.all_gather(reinterpret_cast<std::byte*>(reports_.data()), 1, bytes);
    adapters_.settle(reports_);
    if (channel_ == nullptr) return;
    const std::span<AdapterReport> out = channel_->adapter_reports();
    std::copy_n(reports_.begin(), std::min(reports_.size(), out.size()), out.begin());
  }

  void gather_traces(const StepTiming& timing) {
    group_.stop();
    const auto ticks = [](int64_t ns) {
      return static_cast<uint32_t>(std::clamp<int64_t>(ns / kTraceTickNs, 0, UINT32_MAX));
    };
    traces_.resize(static_cast<size_t>(group_.size()));
    RankTrace& own = traces_[static_cast<size_t>(group_.rank())];
    own = {.count = static_cast<uint32_t>(group_.events().size()),
           .dropped = static_cast<uint32_t>(group_.dropped()),
           .length = ticks(timing.total_ns)};
    for (size_t i = 0; i < group_.events().size(); ++i) {
      const comm::CollectiveEvent& event = group_.events()[i];
      own.collectives[i] = {
          .begin = ticks(event.begin_ns - begin_ns_),
          .length = ticks(event.end_ns - event.begin_ns),
          .wait = ticks(event.wait_ns),
          .bytes = static_cast<uint32_t>(std::min<int64_t>(event.bytes, UINT32_MAX))};
    }
    const std::vector<int64_t> bytes(traces_.size(), sizeof(RankTrace));
    group_.all_gather(reinterpret_cast<std::byte*>(traces_.data()), 1, bytes);
    if (channel_ == nullptr) return;
    const std::span<RankTrace> out = channel_->traces();
    std::copy_n(traces_.begin(), std::min(traces_.size(), out.size()), out.begin());
  }

  void set(std::atomic<uint64_t> RankPage::* field, uint64_t value) {
    if (page_ != nullptr) (page_->*field).store(value, std::memory_order_relaxed);
  }
  void add(std::atomic<uint64_t> RankPage::* field, uint64_t value) {
    if (page_ != nullptr) (page_->*field).fetch_add(value, std::memory_order_relaxed);
  }

  const WorkerOptions& options_;
  models::Model& model_;
  comm::TracedGroup& group_;
  StepChannelRank* channel_;
  RankPage* page_;
  Drafter* drafter_;
  std::optional<LogitsLog> log_;
  std::vector<std::byte> buffer_;
  StepPlanView plan_;
  std::vector<RankTrace> traces_;  // of the last traced step, by rank
  AdapterLoader adapters_;
  std::vector<AdapterReport> reports_;  // of the last order to settle, by rank
  uint64_t last_step_ = 0;
  int64_t begin_ns_ = 0;
  int64_t draft_ns_ = 0;           // of this step
  comm::GroupStats at_begin_;  // when this step's plan had arrived
  comm::GroupStats counted_;   // what is on the page already
};

}  // namespace

void run_worker(const WorkerOptions& options, models::Model& model, comm::TracedGroup& group,
                StepChannelRank* channel, RankPage* page, Drafter* drafter) {
  uint64_t step = 0;
  const auto named = [&](const char* what) {
    return fmt::format("rank {} failed after step {}: {}", group.rank(), step, what);
  };
  const auto end = [&](const std::string& message) {
    group.abort(message.c_str());
    if (channel != nullptr) channel->fail(message);
  };
  try {
    Worker worker(options, model, group, channel, page, drafter);
    while (worker.step()) step = worker.last_step();
  } catch (const Error& error) {
    // A fault of the group names its rank already.
    const bool by_group = error.code() == Code::kAborted || error.code() == Code::kUnavailable;
    end(by_group ? error.what() : named(error.what()));
    throw;
  } catch (const std::exception& error) {
    end(named(error.what()));
    throw;
  }
}

}  // namespace phalanx::engine
