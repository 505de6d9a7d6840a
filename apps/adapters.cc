#include "apps/adapters.h"

#include <fmt/format.h>

#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>

#include "phalanx/base/log.h"
#include "phalanx/weights/adapter_config.h"

namespace phalanx::apps {
namespace {

constexpr double kLoadSeconds = 600;
constexpr int64_t kUsualRank = 16;  // where maxLoraRank says nothing

class Answer {
 public:
  void set(const std::optional<Error>& error) {
    const std::lock_guard lock(mutex_);
    error_ = error;
    done_ = true;
    changed_.notify_all();
  }
  // True when there is one.
  bool wait_for(std::chrono::milliseconds time) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, time, [&] { return done_; });
  }
  std::optional<Error> error() {
    const std::lock_guard lock(mutex_);
    return error_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  std::optional<Error> error_;
};

bool has(const engine::Engine& engine, const std::string& name) {
  const auto adapters = engine.adapters();
  return std::any_of(adapters.begin(), adapters.end(),
                     [&](const auto& a) { return a.name == name; });
}

}  // namespace

AdapterPlan plan_adapters(const ModelConfig& config, const models::ModelInfo& info) {
  AdapterPlan plan{.slots = std::max(config.max_loras, std::ssize(config.lora_modules))};
  if (plan.slots == 0) return plan;
  const int64_t limit = config.max_lora_rank > 0 ? config.max_lora_rank : weights::kMostAdapterRank;
  int64_t found = 0;
  std::string refusals;
  for (const LoraModule& module : config.lora_modules) {
    try {
      const models::AdapterFacts facts = models::check_adapter(info, module.path, limit);
      found = std::max(found, facts.max_rank);
      plan.modules.push_back({module.name, module.path, facts.digest});
    } catch (const Error& error) {
      refusals += fmt::format("{}LoRA adapter '{}': {}", refusals.empty() ? "" : "\n", module.name,
                              error.what());
    }
  }
  if (!refusals.empty()) throw Error(Code::kInvalidArgument, refusals);
  plan.max_rank = config.max_lora_rank > 0 ? config.max_lora_rank
                  : config.max_loras > 0   ? std::max(found, kUsualRank)
                                           : found;
  return plan;
}

void load_adapters(engine::Engine& engine, const AdapterPlan& plan) {
  const Deadline deadline = Deadline::in_seconds(kLoadSeconds);
  for (const AdapterPlan::Module& module : plan.modules) {
    if (has(engine, module.name)) continue;
    const auto answer = std::make_shared<Answer>();
    const auto lost = [&] {
      if (engine.suspended())
        throw Error(Code::kUnavailable,
                    fmt::format("the generation was lost while the LoRA adapter '{}' was loaded",
                                module.name));
      if (deadline.passed())
        throw Error(Code::kDeadlineExceeded,
                    fmt::format("the LoRA adapter '{}' was not loaded within {} s", module.name,
                                kLoadSeconds));
    };
    try {
      engine.load_adapter(module.name, module.path,
                          [answer](const std::optional<Error>& error) { answer->set(error); });
    } catch (const Error& error) {
      // A generation before this one has begun it.
      if (error.code() != Code::kAlreadyExists) throw;
      while (!has(engine, module.name)) {
        (void)answer->wait_for(std::chrono::milliseconds(20));
        lost();
      }
      continue;
    }
    while (!answer->wait_for(std::chrono::milliseconds(50))) lost();
    if (const auto error = answer->error())
      throw Error(error->code(), fmt::format("the LoRA adapter '{}' cannot be loaded: {}",
                                             module.name, error->what()));
    log_info("LoRA adapter '{}' loaded from {}", module.name, module.path);
  }
}

}  // namespace phalanx::apps
