#include "apps/prompt_head.h"

#include <condition_variable>
#include <mutex>

#include "phalanx/base/clock.h"
#include "phalanx/base/log.h"

namespace phalanx::apps {
namespace {

// Results of all requests and how many still run.
struct Board {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<PromptResult> results;
  int64_t running = 0;
};

class BoardSink final : public engine::EventSink {
 public:
  BoardSink(std::shared_ptr<Board> board, size_t place) : board_(std::move(board)), place_(place) {}
  void on_event(engine::GenerateEvent event) override {
    const std::lock_guard lock(board_->mutex);
    PromptResult& result = board_->results[place_];
    if (event.token >= 0) {
      result.tokens.push_back(event.token);
      result.token_ns.push_back(now_ns());
    }
    if (event.finish == engine::FinishReason::kNone) return;
    result.finish = event.finish;
    result.error = event.error;
    --board_->running;
    board_->changed.notify_all();
  }

 private:
  std::shared_ptr<Board> board_;
  size_t place_;
};

}  // namespace

std::vector<PromptResult> run_prompts(engine::Engine& engine,
                                      const std::vector<engine::GenerateRequest>& requests,
                                      int64_t batch) {
  auto board = std::make_shared<Board>();
  board->results.resize(requests.size());
  for (size_t i = 0; i < requests.size(); ++i) {
    {
      std::unique_lock lock(board->mutex);
      board->changed.wait(lock, [&] { return board->running < batch; });
      ++board->running;
      board->results[i].submitted_ns = now_ns();
    }
    std::string detail;
    const engine::SubmitResult submitted =
        engine.submit(requests[i], std::make_shared<BoardSink>(board, i), &detail);
    if (submitted == engine::SubmitResult::kAccepted) continue;
    const std::lock_guard lock(board->mutex);
    board->results[i].finish = engine::FinishReason::kError;
    board->results[i].error = Error(Code::kInvalidArgument, detail);
    --board->running;
  }
  std::unique_lock lock(board->mutex);
  board->changed.wait(lock, [&] { return board->running == 0; });
  return board->results;
}

PromptHead::PromptHead(Instance& instance, std::vector<engine::GenerateRequest> requests,
                       int64_t batch, Done done)
    : instance_(instance), requests_(std::move(requests)), batch_(batch), done_(std::move(done)) {}

PromptHead::~PromptHead() {
  if (thread_.joinable()) thread_.join();
}

void PromptHead::open(engine::Engine& engine) {
  thread_ = std::thread([this, &engine] { run(engine); });
}

void PromptHead::drain(Deadline) {
  if (thread_.joinable()) thread_.join();
}

void PromptHead::run(engine::Engine& engine) {
  done_(run_prompts(engine, requests_, batch_));
  instance_.stop("all prompts are answered");
}

}  // namespace phalanx::apps
