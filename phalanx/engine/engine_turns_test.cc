#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "phalanx/engine/engine_testing.h"

// Who begins when more wait than run: priorities, then clients in turn.

namespace phalanx::engine {
namespace {

constexpr double kAgeingSeconds = 0.02;

// Answers in the order in which requests get their first token, one at a time. Before the last
// `late` of them pass five times kAgeingSeconds.
std::vector<std::string> order_of(const std::vector<GenerateRequest>& requests,
                                  double ageing_seconds = 0, size_t late = 0) {
  EngineOptions options = small_options();
  options.ageing_seconds = ageing_seconds;
  options.max_batch = 1;
  options.max_prefill_batch = 1;
  FakeExecutor executor(options);
  executor.allow(0);
  Engine engine(options, executor);
  std::mutex mutex;
  std::vector<std::string> order;
  class Sink final : public EventSink {
   public:
    Sink(std::mutex& mutex, std::vector<std::string>& order, std::string id)
        : mutex_(mutex), order_(order), id_(std::move(id)) {}
    void on_event(GenerateEvent event) override {
      EXPECT_GE(event.queue_ns, 0);
      const std::lock_guard lock(mutex_);
      if (event.finish != FinishReason::kNone) order_.push_back(id_);
    }

   private:
    std::mutex& mutex_;
    std::vector<std::string>& order_;
    std::string id_;
  };
  // The first holds the only place until all others wait.
  EXPECT_EQ(engine.submit(request_of("first", {1, 2}, 1), std::make_shared<Recorder>(), nullptr),
            SubmitResult::kAccepted);
  executor.wait_for_plans(1);
  for (const GenerateRequest& request : requests) {
    if (late > 0 && &request == &requests[requests.size() - late])
      std::this_thread::sleep_for(std::chrono::duration<double>(5 * kAgeingSeconds));
    auto sink = std::make_shared<Sink>(mutex, order, request.id);
    EXPECT_EQ(engine.submit(request, std::move(sink), nullptr), SubmitResult::kAccepted);
  }
  executor.allow(std::numeric_limits<int64_t>::max());
  EXPECT_TRUE(engine.drain(Deadline::in_seconds(20)));
  const std::lock_guard lock(mutex);
  return order;
}

GenerateRequest of(const std::string& client, int number, int32_t priority = 5) {
  GenerateRequest request = request_of(client + std::to_string(number), {number + 1, 3}, 1);
  request.client = client;
  request.priority = priority;
  return request;
}

TEST(Turns, AClientWithManyDoesNotHoldUpOthers) {
  EXPECT_EQ(order_of({of("a", 1), of("a", 2), of("a", 3), of("a", 4), of("b", 1), of("b", 2), of("c", 1)}),
            (std::vector<std::string>{"a1", "b1", "c1", "a2", "b2", "a3", "a4"}));
}

TEST(Turns, OneClientIsServedAsItCame) {
  EXPECT_EQ(order_of({of("a", 1), of("a", 2), of("a", 3)}), (std::vector<std::string>{"a1", "a2", "a3"}));
}

TEST(Turns, HigherPrioritiesComeFirst) {
  EXPECT_EQ(order_of({of("a", 1), of("b", 1, 3), of("a", 2, 1), of("b", 2), of("a", 3, 1)}),
            (std::vector<std::string>{"a2", "a3", "b1", "a1", "b2"}));
}

TEST(Turns, WhoWaitsLongIsNoLongerOvertaken) {
  const std::vector<GenerateRequest> requests = {of("a", 1, 5), of("b", 1, 1), of("b", 2, 1),
                                                 of("b", 3, 1)};
  EXPECT_EQ(order_of(requests, 0, 3), (std::vector<std::string>{"b1", "b2", "b3", "a1"}));
  EXPECT_EQ(order_of(requests, kAgeingSeconds, 3),
            (std::vector<std::string>{"a1", "b1", "b2", "b3"}));
  // Too little to rise at all.
  EXPECT_EQ(order_of(requests, 1000 * kAgeingSeconds, 3),
            (std::vector<std::string>{"b1", "b2", "b3", "a1"}));
}

}  // namespace
}  // namespace phalanx::engine
