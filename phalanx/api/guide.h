#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "phalanx/engine/request.h"
#include "phalanx/text/grammar.h"

namespace phalanx::api {

// Threads that compute masks while the ranks compute the next step.
class GuideThreads {
 public:
  explicit GuideThreads(int threads);
  ~GuideThreads();
  void post(std::function<void()> work);

 private:
  void run(const std::stop_token& stop);
  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::deque<std::function<void()>> work_;
  std::vector<std::jthread> threads_;
};

// What a sequence's tokens must follow: perhaps a text of reasoning, of bounded length, and after it
// perhaps a grammar.
struct GuideOptions {
  int64_t vocab_size = 0;
  bool reasoning = false;              // the text begins inside reasoning
  std::vector<int32_t> reasoning_end;  // ids that end it
  int64_t reasoning_budget = -1;       // tokens; then the end is forced. -1: none
};

// `walker` may be null. The first mask is computed here.
[[nodiscard]] std::shared_ptr<engine::TokenGuide> make_guide(
    GuideOptions options, std::unique_ptr<text::GrammarWalker> walker,
    std::shared_ptr<GuideThreads> threads);

}  // namespace phalanx::api
