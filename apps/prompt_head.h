#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "apps/instance.h"
#include "phalanx/engine/request.h"

namespace phalanx::apps {

// What became of one prompt.
struct PromptResult {
  std::vector<int32_t> tokens;
  engine::FinishReason finish = engine::FinishReason::kNone;
  std::optional<Error> error;
  int64_t submitted_ns = 0;
  std::vector<int64_t> token_ns;   // arrival of each token
};

// Runs the requests, at most `batch` at once, and returns when all have ended.
[[nodiscard]] std::vector<PromptResult> run_prompts(
    engine::Engine& engine, const std::vector<engine::GenerateRequest>& requests, int64_t batch);

// Offline use of an instance: runs a list of requests, at most `batch` at once, hands over the
// results and stops the instance.
class PromptHead final : public Head {
 public:
  using Done = std::function<void(const std::vector<PromptResult>& results)>;
  PromptHead(Instance& instance, std::vector<engine::GenerateRequest> requests, int64_t batch,
             Done done);
  ~PromptHead() override;
  void open(engine::Engine& engine) override;
  void drain(Deadline deadline) override;
  void fail(const Error&) override {}  // the engine tells every request

 private:
  void run(engine::Engine& engine);

  Instance& instance_;
  std::vector<engine::GenerateRequest> requests_;
  int64_t batch_;
  Done done_;
  std::thread thread_;
};

}  // namespace phalanx::apps
