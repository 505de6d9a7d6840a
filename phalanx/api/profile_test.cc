#include "phalanx/api/profile.h"

#include <gtest/gtest.h>

#include <future>
#include <nlohmann/json.hpp>

#include "phalanx/api/testing.h"

namespace phalanx::api {
namespace {

using engine::StepTrace;
using nlohmann::json;
using testing::fetch;
using testing::Instance;
using testing::Reply;

// Two ranks; rank 1 computes 400 us, waits 100 us and transfers 50 us, rank 0 only computes.
StepTrace step_of(uint64_t number, int64_t begin_ns) {
  return {.generation = 3,
          .step = number,
          .begin_ns = begin_ns,
          .sent_ns = begin_ns + 20'000,
          .answered_ns = begin_ns + 620'000,
          .end_ns = begin_ns + 650'000,
          .sequences = 2,
          .tokens = 5,
          .rows = 2,
          .ranks = {{.length = 6000, .dropped = 0, .collectives = {}},
                    {.length = 5500,
                     .dropped = 7,
                     .collectives = {{.begin = 3000, .length = 1500, .wait = 1000, .bytes = 64}}}}};
}

// Sum of the slices of one name in one process, in us.
double sum(const json& trace, int process, const std::string& name) {
  double us = 0;
  for (const json& event : trace.at("traceEvents"))
    if (event.at("ph") == "X" && event.at("pid") == process && event.at("name") == name)
      us += event.at("dur").get<double>();
  return us;
}

TEST(Profile, ATraceHasHeadAndRanksOnOneTimeLine) {
  const std::vector<StepTrace> steps = {step_of(8, 1'000'000), step_of(9, 2'000'000)};
  const json trace = json::parse(to_chrome_trace(steps, {{1, "10.0.0.2"}}));
  std::vector<std::string> names;
  for (const json& event : trace.at("traceEvents"))
    if (event.at("ph") == "M") names.push_back(event.at("args").at("name"));
  EXPECT_EQ(names, (std::vector<std::string>{"head", "rank 0", "rank 1, node 10.0.0.2"}));
  EXPECT_DOUBLE_EQ(sum(trace, 0, "plan"), 40);
  EXPECT_DOUBLE_EQ(sum(trace, 0, "ranks"), 1200);
  EXPECT_DOUBLE_EQ(sum(trace, 0, "sample"), 60);
  EXPECT_DOUBLE_EQ(sum(trace, 1, "compute"), 1200);
  EXPECT_DOUBLE_EQ(sum(trace, 2, "compute"), 800);
  EXPECT_DOUBLE_EQ(sum(trace, 2, "wait"), 200);
  EXPECT_DOUBLE_EQ(sum(trace, 2, "transfer"), 100);
  bool found = false;
  for (const json& event : trace.at("traceEvents")) {
    if (event.at("name") != "step" || event.at("pid") != 2 || event.at("args").at("step") != 9) continue;
    found = true;
    EXPECT_DOUBLE_EQ(event.at("ts").get<double>(), 1020);
    EXPECT_EQ(event.at("args").at("tokens"), 5);
    EXPECT_EQ(event.at("args").at("collectives_not_shown"), 7);
    EXPECT_DOUBLE_EQ(event.at("args").at("compute_us").get<double>(), 400);
  }
  EXPECT_TRUE(found);
}

// Rank 0 computes the draft model first; the others' steps begin after that.
TEST(Profile, ADraftModelsTimeIsShown) {
  std::vector<StepTrace> steps = {step_of(8, 1'000'000)};
  steps[0].draft_ns = 150'000;
  const json trace = json::parse(to_chrome_trace(steps, {}));
  EXPECT_DOUBLE_EQ(sum(trace, 1, "draft"), 150);
  EXPECT_DOUBLE_EQ(sum(trace, 1, "compute"), 450);
  EXPECT_DOUBLE_EQ(sum(trace, 2, "draft"), 0);
  for (const json& event : trace.at("traceEvents")) {
    if (event.at("name") != "step") continue;
    const bool first = event.at("pid") == 1;
    EXPECT_DOUBLE_EQ(event.at("ts").get<double>(), first ? 20 : 170);
    EXPECT_EQ(event.at("args").contains("draft_us"), first);
  }
}

TEST(Profile, TheRouteAnswersWithTheNextSteps) {
  Instance instance;
  instance.engine.steps_to_trace = {step_of(1, 0), step_of(2, 1'000'000)};
  const Reply reply = fetch(instance.port, "/v1/profile?steps=2");
  EXPECT_EQ(reply.status, 200);
  EXPECT_DOUBLE_EQ(sum(json::parse(reply.body), 0, "plan"), 40);
  // Fewer than asked for when the time passes.
  EXPECT_EQ(fetch(instance.port, "/v1/profile?steps=3&seconds=1").status, 200);
}

TEST(Profile, OneAtATime) {
  Instance instance;
  auto first = std::async(std::launch::async,
                          [&] { return fetch(instance.port, "/v1/profile?seconds=1"); });
  const Deadline deadline = Deadline::in_seconds(10);
  int status = 0;
  while (status != 409 && !deadline.passed() &&
         first.wait_for(std::chrono::milliseconds(5)) != std::future_status::ready)
    status = fetch(instance.port, "/v1/profile?steps=1&seconds=1").status;
  const Reply reply = first.get();
  EXPECT_TRUE(status == 409 || reply.status == 409);
}

TEST(Profile, NumbersOutOfRangeAreNamed) {
  Instance instance;
  for (const auto& [query, says] : std::vector<std::pair<std::string, std::string>>{
           {"steps=0", "steps must be a whole number in [1, 1000], got '0'"},
           {"steps=1001", "steps must be a whole number in [1, 1000], got '1001'"},
           {"steps", "steps must be a whole number in [1, 1000], got ''"},
           {"steps=2x", "steps must be a whole number in [1, 1000], got '2x'"},
           {"steps=1&seconds=-4", "seconds must be a whole number in [1, 600], got '-4'"}}) {
    const Reply reply = fetch(instance.port, "/v1/profile?" + query);
    EXPECT_EQ(reply.status, 422) << query;
    EXPECT_NE(reply.body.find(says), std::string::npos) << reply.body;
  }
}

}  // namespace
}  // namespace phalanx::api
