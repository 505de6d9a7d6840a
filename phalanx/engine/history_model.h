#pragma once

// For tests: a model whose logits are a pure function of the tokens before, read back through the
// block tables from a KV cache that remembers which token at which position each slot holds. So a
// wrong slot, a block that two sequences share or that was given up too early, or a token that was
// never computed changes the output or is reported at once.

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/models/model.h"

namespace phalanx::engine {

inline constexpr int64_t kHistoryVocab = 97;

// Logits after these tokens, f32 [kHistoryVocab], between -4 and 4.
inline void history_logits(std::span<const int32_t> tokens, float* logits) {
  uint64_t hash = 1469598103934665603u;
  for (const int32_t token : tokens) {
    hash = (hash ^ static_cast<uint64_t>(token + 1)) * 1099511628211u;
  }
  for (int64_t i = 0; i < kHistoryVocab; ++i) {
    uint64_t x = hash + static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    logits[i] = static_cast<float>((x >> 40) % 8001) / 1000.0f - 4.0f;
  }
}

class HistoryModel final : public models::Model {
 public:
  HistoryModel(int64_t blocks, int64_t block_size) : block_size_(block_size) {
    info_.vocab_size = kHistoryVocab;
    allocate_kv(blocks);
  }
  [[nodiscard]] const models::ModelInfo& info() const override { return info_; }
  [[nodiscard]] const models::LoadStats& load_stats() const override { return stats_; }
  [[nodiscard]] models::StepTimes last_times() const override { return {}; }
  void allocate_kv(int64_t blocks) override {
    slots_.assign(static_cast<size_t>(blocks * block_size_), Slot{});
  }
  void forward(const models::StepInputs& in, float* logits) override {
    for (size_t t = 0; t < in.tokens.size(); ++t) {
      slots_[static_cast<size_t>(in.slots[t])] = {in.tokens[t], in.positions[t]};
    }
    size_t row = 0;
    for (const auto& s : in.sequences) {
      std::vector<int32_t> history;
      for (int32_t p = 0; p < s.context; ++p) {
        const int64_t block = s.block_table[p / block_size_];
        const Slot& slot = slots_[static_cast<size_t>(block * block_size_ + p % block_size_)];
        if (slot.position != p) {
          ADD_FAILURE() << "the slot of position " << p << " holds position " << slot.position;
        }
        history.push_back(slot.token);
      }
      for (; row < in.sample_rows.size() &&
             in.sample_rows[row] < s.token_begin + s.token_count;
           ++row) {
        const int32_t length =
            s.context - s.token_count + in.sample_rows[row] - s.token_begin + 1;
        if (logits == nullptr) continue;
        history_logits(std::span<const int32_t>(history).first(static_cast<size_t>(length)),
                       logits + static_cast<int64_t>(row) * kHistoryVocab);
      }
    }
    if (on_forward) on_forward(in, logits);
  }

  // After the logits are written.
  std::function<void(const models::StepInputs&, float*)> on_forward;

 private:
  struct Slot {
    int32_t token = -1;
    int32_t position = -1;
  };
  int64_t block_size_;
  models::ModelInfo info_;
  models::LoadStats stats_;
  std::vector<Slot> slots_;
};

}  // namespace phalanx::engine
