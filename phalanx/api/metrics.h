#pragma once

#include <array>
#include <cstdint>
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

// What `GET /metrics` says (rest-api sheet, 3.1). Any thread.
class Metrics {
 public:
  Metrics();
  void received();
  void first_token(double seconds);
  void next_token(double seconds);
  void succeeded(double seconds, int64_t prompt_tokens, int64_t output_tokens);
  void failed();
  // About once a second; makes the averages per second.
  void tick(const engine::EngineStats& stats);
  [[nodiscard]] std::string render(const std::string& model_name,
                                   const engine::EngineStats& stats) const;

 private:
  mutable std::mutex mutex_;
  uint64_t received_ = 0, succeeded_ = 0, failed_ = 0;
  Histogram first_token_, next_token_, latency_, prompt_tokens_, output_tokens_;
  uint64_t last_prompt_tokens_ = 0, last_output_tokens_ = 0;
  Clock::time_point last_tick_ = Clock::now();
  double prompt_rate_ = 0, output_rate_ = 0;
};

}  // namespace phalanx::api
