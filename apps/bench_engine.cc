#include "apps/bench_engine.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <nlohmann/json.hpp>
#include <random>

#include "apps/instance.h"
#include "apps/prompt_head.h"
#include "phalanx/base/log.h"

namespace phalanx::apps {
namespace {

struct BenchArguments {
  std::string model;
  int tp = 1;
  int threads = 0;
  int nodes = 1;
  std::vector<int64_t> batches = {1, 32};
  int64_t prompt = 128;
  int64_t output = 32;
};

struct Speed {
  double prefill_tokens_per_s = 0;
  double decode_tokens_per_s = 0;
  double total_tokens_per_s = 0;
  std::string status;
};

// Output tokens per second between the moment every request has its first token and the moment the
// first of them ends, so that the batch is full throughout.
Speed measure(const std::vector<PromptResult>& results, int64_t prompt) {
  int64_t begin = INT64_MAX;
  int64_t all_started = 0;
  int64_t first_end = INT64_MAX;
  int64_t end = 0;
  int64_t tokens = 0;
  for (const PromptResult& r : results) {
    if (r.error) throw *r.error;
    begin = std::min(begin, r.submitted_ns);
    all_started = std::max(all_started, r.token_ns.front());
    first_end = std::min(first_end, r.token_ns.back());
    end = std::max(end, r.token_ns.back());
    tokens += static_cast<int64_t>(r.tokens.size());
  }
  int64_t between = 0;
  for (const PromptResult& r : results)
    between += std::count_if(r.token_ns.begin(), r.token_ns.end(),
                             [&](int64_t t) { return t > all_started && t <= first_end; });
  const auto per_second = [](int64_t count, int64_t ns) {
    return ns <= 0 ? 0.0 : static_cast<double>(count) * 1e9 / static_cast<double>(ns);
  };
  return {.prefill_tokens_per_s =
              per_second(static_cast<int64_t>(results.size()) * prompt, all_started - begin),
          .decode_tokens_per_s = per_second(between, first_end - all_started),
          .total_tokens_per_s = per_second(tokens, end - begin)};
}

Speed run_once(const BenchArguments& a, int64_t batch) {
  NodeConfig config;
  config.model.name = "bench";
  config.model.weight_path = a.model;
  config.model.max_sequence = a.prompt + a.output + 1;
  config.model.max_input_tokens = a.prompt;
  config.schedule.max_batch = batch;
  config.schedule.max_prefill_batch = batch;
  config.schedule.max_prefill_tokens = 8192;
  config.schedule.max_output_tokens = a.output;
  config.threads_per_rank = a.threads;
  config.npu_memory_fraction = 0.9;
  config.table.world_size = a.tp;
  config.table.servers.push_back({.server_id = "127.0.0.1", .container_ip = "127.0.0.1"});
  for (int rank = 0; rank < a.tp; ++rank)
    config.table.servers[0].devices.push_back({.device_id = rank, .rank_id = rank});
  const NodePlan plan = plan_node(config, host_resources());

  std::mt19937 random(7);
  std::uniform_int_distribution<int32_t> token(0, static_cast<int32_t>(plan.info.vocab_size - 1));
  std::vector<engine::GenerateRequest> requests;
  for (int64_t i = 0; i < batch; ++i) {
    engine::GenerateRequest request{.id = fmt::format("bench-{}", i)};
    for (int64_t t = 0; t < a.prompt; ++t) request.prompt.push_back(token(random));
    request.sampling.temperature = 0;
    request.sampling.max_tokens = static_cast<int32_t>(a.output);
    requests.push_back(std::move(request));
  }
  Instance instance(config, plan);
  Speed speed;
  std::string failure;
  instance.set_head(std::make_unique<PromptHead>(
      instance, std::move(requests), batch, [&](const std::vector<PromptResult>& results) {
        try {
          speed = measure(results, a.prompt);
          speed.status = instance.status_json();
        } catch (const std::exception& e) {
          failure = e.what();
        }
      }));
  const int status = instance.run();
  if (!failure.empty()) throw Error(Code::kInternal, failure);
  if (status != 0) throw Error(Code::kInternal, "the instance under measurement failed");
  return speed;
}

}  // namespace

int bench_engine(int argc, char** argv) {
  BenchArguments a;
  CLI::App app{"Prefill and decode speed through the whole engine, on local ranks."};
  app.add_option("--model", a.model, "checkpoint directory (phalanx make-random-model makes one)")->required();
  app.add_option("--tp", a.tp, "ranks")->check(CLI::Range(1, 64));
  app.add_option("--threads", a.threads, "per rank; 0: cores divided by ranks")->check(CLI::Range(0, 1024));
  app.add_option("--batch", a.batches, "numbers of requests at once");
  app.add_option("--prompt", a.prompt, "prompt tokens")->check(CLI::PositiveNumber);
  app.add_option("--output", a.output, "output tokens")->check(CLI::Range(2, 100000));
  CLI11_PARSE(app, argc, argv);
  set_up_log({.level = LogLevel::kWarn});
  fmt::print("{} rank{}, {} prompt and {} output tokens\n", a.tp, a.tp == 1 ? "" : "s", a.prompt, a.output);
  fmt::print("{:>6} {:>14} {:>14} {:>14} {:>10} {:>10} {:>10} {:>10}\n", "batch", "prefill tok/s",
             "decode tok/s", "whole tok/s", "compute %", "wire %", "wait %", "head %");
  for (const int64_t batch : a.batches) {
    const Speed speed = run_once(a, batch);
    const nlohmann::json status = nlohmann::json::parse(speed.status);
    double compute = 0;
    double transfer = 0;
    double wait = 0;
    for (const nlohmann::json& rank : status["ranks"]) {
      compute += rank["compute_ns"].get<double>();
      transfer += rank["transfer_ns"].get<double>();
      wait += rank["wait_ns"].get<double>();
    }
    const double step = std::max(1.0, status["engine"]["step_ns"].get<double>());
    const double overhead = status["engine"]["overhead_ns"].get<double>();
    const double ranks = std::max(1.0, compute + transfer + wait);
    fmt::print("{:>6} {:>14.1f} {:>14.1f} {:>14.1f} {:>10.1f} {:>10.1f} {:>10.1f} {:>10.1f}\n", batch,
               speed.prefill_tokens_per_s, speed.decode_tokens_per_s, speed.total_tokens_per_s,
               100 * compute / ranks, 100 * transfer / ranks, 100 * wait / ranks,
               100 * overhead / (step + overhead));
  }
  return 0;
}

}  // namespace phalanx::apps
