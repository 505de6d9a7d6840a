#include "phalanx/api/metrics.h"

#include <fmt/format.h>

#include <algorithm>

namespace phalanx::api {
namespace {

const std::vector<double> kTokenCountBounds = {10,    50,    100,   200,   500,   1000,  2000,  5000,
                                               10000, 16000, 20000, 32000, 50000, 64000, 128000};

std::string escape_label(const std::string& value) {
  std::string out;
  for (const char c : value) {
    if (c == '\n') {
      out += "\\n";
      continue;
    }
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out;
}

std::string head(const std::string& name, const std::string& help, const char* type) {
  return fmt::format("# HELP {} {}\n# TYPE {} {}\n", name, help, name, type);
}

}  // namespace

Histogram::Histogram(std::vector<double> bounds)
    : bounds_(std::move(bounds)), counts_(bounds_.size() + 1) {}

void Histogram::observe(double value) {
  const auto at = std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin();
  ++counts_[static_cast<size_t>(at)];
  sum_ += value;
}

std::string Histogram::render(const std::string& name, const std::string& help,
                              const std::string& label) const {
  std::string out = head(name, help, "histogram");
  uint64_t total = 0;
  for (size_t i = 0; i < counts_.size(); ++i) {
    total += counts_[i];
    const std::string bound = i < bounds_.size() ? fmt::format("{}", bounds_[i]) : "+Inf";
    out += fmt::format("{}_bucket{{{},le=\"{}\"}} {}\n", name, label, bound, total);
  }
  out += fmt::format("{}_sum{{{}}} {}\n{}_count{{{}}} {}\n", name, label, sum_, name, label, total);
  return out;
}

void MovingAverage::add(double value) {
  values_.push_back(value);
  sum_ += value;
  if (values_.size() > size_) {
    sum_ -= values_.front();
    values_.pop_front();
  }
}

Metrics::Metrics(size_t average_window)
    : first_token_({0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5,
                    10}),
      next_token_({0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5}),
      latency_({1, 2.5, 5, 10, 15, 20, 30, 40, 50, 60}),
      prompt_tokens_(kTokenCountBounds),
      output_tokens_(kTokenCountBounds),
      first_token_average_(average_window),
      next_token_average_(average_window) {}

void Metrics::received() {
  const std::lock_guard lock(mutex_);
  ++received_;
}

void Metrics::first_token(double seconds) {
  const std::lock_guard lock(mutex_);
  first_token_.observe(seconds);
  first_token_average_.add(seconds);
}

void Metrics::next_token(double seconds) {
  const std::lock_guard lock(mutex_);
  next_token_.observe(seconds);
  next_token_average_.add(seconds);
}

void Metrics::succeeded(double seconds, int64_t prompt_tokens, int64_t output_tokens) {
  const std::lock_guard lock(mutex_);
  ++succeeded_;
  latency_.observe(seconds);
  prompt_tokens_.observe(static_cast<double>(prompt_tokens));
  output_tokens_.observe(static_cast<double>(output_tokens));
}

void Metrics::failed() {
  const std::lock_guard lock(mutex_);
  ++failed_;
}

void Metrics::tick(const engine::EngineStats& stats) {
  const std::lock_guard lock(mutex_);
  const auto now = Clock::now();
  const double seconds = std::chrono::duration<double>(now - last_tick_).count();
  if (seconds < 0.9) return;
  prompt_rate_ = static_cast<double>(stats.prompt_tokens - last_prompt_tokens_) / seconds;
  output_rate_ = static_cast<double>(stats.output_tokens - last_output_tokens_) / seconds;
  last_prompt_tokens_ = stats.prompt_tokens;
  last_output_tokens_ = stats.output_tokens;
  last_tick_ = now;
}

Metrics::Averages Metrics::averages() const {
  const std::lock_guard lock(mutex_);
  return {first_token_average_.mean() * 1e3, next_token_average_.mean() * 1e3};
}

std::string Metrics::render(const MetricsView& view) const {
  const std::lock_guard lock(mutex_);
  const engine::EngineStats& stats = view.engine;
  const std::string name = escape_label(view.model_name);
  std::string label = fmt::format("model_name=\"{}\"", name);
  std::string out;
  const auto add = [&](const char* metric, const char* help, const char* type, auto value) {
    out += head(metric, help, type);
    out += fmt::format("{}{{{}}} {}\n", metric, label, value);
  };
  const double cache_use =
      stats.blocks_total > 0
          ? 1.0 - static_cast<double>(stats.blocks_free) / static_cast<double>(stats.blocks_total)
          : 0.0;
  const double failed_share =
      received_ > 0 ? static_cast<double>(failed_) / static_cast<double>(received_) : 0.0;
  const double hit_rate = stats.prompt_tokens > 0 ? static_cast<double>(stats.cached_tokens) /
                                                        static_cast<double>(stats.prompt_tokens)
                                                  : 0.0;
  const auto histograms = [&](const std::string& prefix) {
    out += first_token_.render(prefix + "time_to_first_token_seconds",
                               "Time to first token in seconds.", label);
    out += next_token_.render(prefix + "time_per_output_token_seconds",
                              "Time per output token in seconds.", label);
    out += latency_.render(prefix + "e2e_request_latency_seconds", "End to end latency in seconds.",
                           label);
    out += prompt_tokens_.render(prefix + "request_prompt_tokens", "Prompt tokens of a request.", label);
    out += output_tokens_.render(prefix + "request_generation_tokens",
                                 "Generated tokens of a request.", label);
  };
  add("request_received_total", "Count of received requests.", "counter", received_);
  add("request_success_total", "Count of finished requests.", "counter", succeeded_);
  add("request_failed_total", "Count of failed requests.", "counter", failed_);
  add("prompt_tokens_total", "Number of prompt tokens processed.", "counter", stats.prompt_tokens);
  add("generation_tokens_total", "Number of tokens generated.", "counter", stats.output_tokens);
  add("num_preemptions_total", "Count of preemptions.", "counter", stats.preemptions);
  add("num_requests_running", "Number of requests running.", "gauge", stats.running);
  add("num_requests_waiting", "Number of requests waiting.", "gauge", stats.waiting);
  add("num_requests_swapped", "Number of requests swapped out.", "gauge", 0);
  add("avg_prompt_throughput_toks_per_s", "Prompt tokens per second.", "gauge", prompt_rate_);
  add("avg_generation_throughput_toks_per_s", "Generated tokens per second.", "gauge", output_rate_);
  add("failed_request_perc", "Share of requests that failed. 1 means 100 percent.", "gauge",
      failed_share);
  add("npu_cache_usage_perc", "KV cache usage. 1 means 100 percent.", "gauge", cache_use);
  add("cpu_cache_usage_perc", "CPU swap cache usage. 1 means 100 percent.", "gauge", 0);
  add("npu_prefix_cache_hit_rate", "Prefix cache block hit rate.", "gauge", hit_rate);
  add("all_radix_match_num", "Prompt tokens that take part in prefix matching.", "gauge",
      stats.prompt_tokens);
  add("npu_radix_match_hit_num", "Prompt tokens found in the prefix cache.", "gauge",
      stats.cached_tokens);
  histograms("");

  label = fmt::format("model_name=\"{}\",engine=\"0\"", name);
  add("vllm:num_requests_running", "Number of requests running.", "gauge", stats.running);
  add("vllm:num_requests_waiting", "Number of requests waiting.", "gauge", stats.waiting);
  add("vllm:kv_cache_usage_perc", "KV cache usage. 1 means 100 percent.", "gauge", cache_use);
  add("vllm:gpu_cache_usage_perc", "KV cache usage, under its older name.", "gauge", cache_use);
  add("vllm:num_preemptions_total", "Count of preemptions.", "counter", stats.preemptions);
  add("vllm:prompt_tokens_total", "Number of prompt tokens processed.", "counter",
      stats.prompt_tokens);
  add("vllm:generation_tokens_total", "Number of tokens generated.", "counter", stats.output_tokens);
  add("vllm:request_success_total", "Count of finished requests.", "counter", succeeded_);
  add("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", "counter",
      stats.prompt_tokens);
  add("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", "counter",
      stats.cached_tokens);
  add("vllm:spec_decode_num_drafts_total", "Number of drafts.", "counter", stats.drafts);
  add("vllm:spec_decode_num_draft_tokens_total", "Number of draft tokens.", "counter",
      stats.draft_tokens);
  add("vllm:spec_decode_num_accepted_tokens_total", "Number of draft tokens that were right.",
      "counter", stats.accepted_draft_tokens);
  if (stats.draft_places > 0)
    out += head("vllm:spec_decode_num_accepted_tokens_per_pos_total",
                "Number of draft tokens that were right, by their place in the draft.", "counter");
  for (int64_t place = 0; place < stats.draft_places; ++place)
    out += fmt::format(
        "vllm:spec_decode_num_accepted_tokens_per_pos_total{{{},position=\"{}\"}} {}\n", label, place,
        stats.accepted_by_place[static_cast<size_t>(place)]);
  histograms("vllm:");
  out += next_token_.render("vllm:inter_token_latency_seconds",
                            "Time between two tokens of a request in seconds.", label);

  label = fmt::format("model_name=\"{}\"", name);
  const auto seconds = [](uint64_t ns) { return static_cast<double>(ns) * 1e-9; };
  out += head("phalanx_step_seconds", "Time of a step of the whole instance in seconds.", "summary");
  out += fmt::format("phalanx_step_seconds_sum{{{0}}} {1}\nphalanx_step_seconds_count{{{0}}} {2}\n",
                     label, seconds(stats.step_ns), stats.steps);
  add("phalanx_step_overhead_seconds_total", "Planning and sampling in the head in seconds.",
      "counter", seconds(stats.overhead_ns));
  add("phalanx_draft_seconds_total", "Time in the draft model of speculation in seconds.", "counter",
      seconds(stats.draft_ns));
  const auto per_rank = [&](const char* metric, const char* help, auto member) {
    if (view.ranks.empty()) return;
    out += head(metric, help, "counter");
    for (const RankFigures& rank : view.ranks)
      out += fmt::format("{}{{{},rank=\"{}\",node=\"{}\"}} {}\n", metric, label, rank.rank,
                         escape_label(rank.node), rank.*member);
  };
  per_rank("phalanx_rank_compute_seconds_total", "Time a rank computed in seconds.",
           &RankFigures::compute_seconds);
  per_rank("phalanx_rank_communication_seconds_total",
           "Time a rank sent, received and copied in seconds.", &RankFigures::communication_seconds);
  per_rank("phalanx_rank_wait_seconds_total", "Time a rank waited for other ranks in seconds.",
           &RankFigures::wait_seconds);
  per_rank("phalanx_rank_steps_total", "Steps a rank has done.", &RankFigures::steps);
  per_rank("phalanx_rank_sent_bytes_total", "Bytes a rank sent to other nodes.",
           &RankFigures::bytes_sent);
  per_rank("phalanx_rank_received_bytes_total", "Bytes a rank received from other nodes.",
           &RankFigures::bytes_received);
  per_rank("phalanx_rank_shared_bytes_total", "Bytes a rank exchanged within its node.",
           &RankFigures::bytes_shared);
  if (view.generation > 0) {
    add("phalanx_generation", "Number of the present group of ranks.", "gauge", view.generation);
    add("phalanx_recovering", "1 while a rank or node is lost and waited for.", "gauge",
        view.recovering ? 1 : 0);
    add("phalanx_recoveries_total", "Losses that requests went on after.", "counter",
        view.recoveries);
    add("phalanx_last_recovery_seconds", "From the last loss to serving again in seconds.", "gauge",
        view.last_recovery_seconds);
    out += head("phalanx_node_up", "0 while a node is lost, with the verdict on it.", "gauge");
    for (const NodeFigures& node : view.nodes)
      out += fmt::format("phalanx_node_up{{{},node=\"{}\",verdict=\"{}\"}} {}\n", label,
                         escape_label(node.address), escape_label(node.verdict), node.up ? 1 : 0);
  }
  if (!view.certificates.empty()) {
    out += head("phalanx_certificate_end_timestamp_seconds",
                "When the certificate of a plane ends, in seconds since 1970.", "gauge");
    for (const auto& certificate : view.certificates)
      out += fmt::format("phalanx_certificate_end_timestamp_seconds{{plane=\"{}\"}} {}\n",
                         escape_label(certificate.plane), certificate.not_after);
  }
  return out;
}

}  // namespace phalanx::api
