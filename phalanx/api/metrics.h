#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "phalanx/base/clock.h"
#include "phalanx/engine/engine.h"

namespace phalanx::api {

// Prometheus histogram: counts per upper bound, and the sum.
class Histogram {
 public:
  explicit Histogram(std::vector<double> bounds);
  void observe(double value);
  [[nodiscard]] std::string render(const std::string& name, const std::string& help,
                                   const std::string& label) const;

 private:
  std::vector<double> bounds_;
  std::vector<uint64_t> counts_;  // one more than bounds_
  double sum_ = 0;
};

// One rank's counters since its start.
struct RankFigures {
  int rank = 0;
  std::string node;
  double compute_seconds = 0, communication_seconds = 0, wait_seconds = 0;
  uint64_t steps = 0, bytes_sent = 0, bytes_received = 0, bytes_shared = 0;
};

struct NodeFigures {
  std::string address;
  std::string verdict;  // dead, stuck, cut off or away, while it is lost
  bool up = true;
};

struct CertificateFigures {
  std::string plane;
  int64_t not_after = 0;  // seconds since 1970
};

// What others know at the moment of an answer.
struct MetricsView {
  std::string model_name;
  engine::EngineStats engine;
  std::vector<RankFigures> ranks;
  std::vector<NodeFigures> nodes;
  uint64_t generation = 0, recoveries = 0;
  double last_recovery_seconds = 0;
  bool recovering = false;
  std::vector<CertificateFigures> certificates;
};

// The mean of the last `size` values.
class MovingAverage {
 public:
  explicit MovingAverage(size_t size) : size_(size) {}
  void add(double value);
  [[nodiscard]] double mean() const { return values_.empty() ? 0 : sum_ / static_cast<double>(values_.size()); }

 private:
  size_t size_;
  std::deque<double> values_;
  double sum_ = 0;
};

// What `GET /metrics` says (rest-api sheet, 3.1), the same under vLLM's names, and what only Phalanx
// knows: docs/metrics.md. Any thread.
class Metrics {
 public:
  explicit Metrics(size_t average_window = 1000);
  void received();
  void first_token(double seconds);
  void next_token(double seconds);
  void succeeded(double seconds, int64_t prompt_tokens, int64_t output_tokens);
  void failed();
  // About once a second; makes the averages per second.
  void tick(const engine::EngineStats& stats);
  [[nodiscard]] std::string render(const MetricsView& view) const;
  struct Averages {
    double first_token_ms = 0, next_token_ms = 0;
  };
  // Over the last DYNAMIC_AVERAGE_WINDOW_SIZE (default 1000) observations.
  [[nodiscard]] Averages averages() const;

 private:
  mutable std::mutex mutex_;
  uint64_t received_ = 0, succeeded_ = 0, failed_ = 0;
  Histogram first_token_, next_token_, latency_, prompt_tokens_, output_tokens_;
  uint64_t last_prompt_tokens_ = 0, last_output_tokens_ = 0;
  Clock::time_point last_tick_ = Clock::now();
  double prompt_rate_ = 0, output_rate_ = 0;
  MovingAverage first_token_average_, next_token_average_;
};

}  // namespace phalanx::api
