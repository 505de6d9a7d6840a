#pragma once

// For tests: a model whose logits are a pure function of the tokens before, read back through the
// block tables from a KV cache that remembers which token at which position each slot holds. So a
// wrong slot, a block that two sequences share or that was given up too early, or a token that was
// never computed changes the output or is reported at once.

#include <gtest/gtest.h>

#include <cstdint>
#include <algorithm>
#include <functional>
#include <memory>
#include <span>
#include <string>
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
    for (size_t i = 0; i < in.sequences.size(); ++i) {
      const auto& s = in.sequences[i];
      for (auto t = static_cast<size_t>(s.token_begin);
           t < static_cast<size_t>(s.token_begin + s.token_count); ++t)
        slots_[static_cast<size_t>(in.slots[t])] = {in.tokens[t], in.positions[t],
                                                    adapter_of(in, i)};
    }
    size_t row = 0;
    for (size_t i = 0; i < in.sequences.size(); ++i) {
      const auto& s = in.sequences[i];
      std::vector<int32_t> history;
      for (int32_t p = 0; p < s.context; ++p) {
        const int64_t block = s.block_table[p / block_size_];
        const Slot& slot = slots_[static_cast<size_t>(block * block_size_ + p % block_size_)];
        if (slot.position != p) {
          ADD_FAILURE() << "the slot of position " << p << " holds position " << slot.position;
        }
        if (slot.adapter != adapter_of(in, i)) {
          ADD_FAILURE() << "position " << p << " was computed with the adapter " << slot.adapter;
        }
        history.push_back(slot.token);
      }
      // Another adapter, another model: as if its digest stood before all tokens.
      if (const std::string& adapter = adapter_of(in, i); !adapter.empty())
        history.insert(history.begin(), 1000 + adapter.front());
      for (; row < in.sample_rows.size() &&
             in.sample_rows[row] < s.token_begin + s.token_count;
           ++row) {
        const int32_t length =
            s.context - s.token_count + in.sample_rows[row] - s.token_begin + 1;
        if (logits == nullptr) continue;
        const size_t before = adapter_of(in, i).empty() ? 0 : 1;
        history_logits(std::span<const int32_t>(history).first(before + static_cast<size_t>(length)),
                       logits + static_cast<int64_t>(row) * kHistoryVocab);
      }
    }
    if (on_forward) on_forward(in, logits);
  }

  // The adapter's path stands for its files.
  class NamedAdapter final : public models::Adapter {
   public:
    explicit NamedAdapter(const std::string& path) : Adapter(path) {}
  };
  [[nodiscard]] std::unique_ptr<models::Adapter> read_adapter(const std::string& path) const override {
    if (path == unreadable) throw Error(Code::kNotFound, path + " is not there");
    return std::make_unique<NamedAdapter>(path + other_files);
  }
  void set_adapter(int64_t slot, std::unique_ptr<models::Adapter> adapter) override {
    adapters_.resize(std::max(adapters_.size(), static_cast<size_t>(slot) + 1));
    adapters_[static_cast<size_t>(slot)] = std::move(adapter);
  }

  // Set before they are used:
  std::string unreadable = "missing";  // no adapter can be read from there
  std::string other_files;             // these of every adapter are not those of other ranks

  // After the logits are written.
  std::function<void(const models::StepInputs&, float*)> on_forward;

 private:
  struct Slot {
    int32_t token = -1;
    int32_t position = -1;
    std::string adapter;  // that it was computed with
  };
  [[nodiscard]] std::string adapter_of(const models::StepInputs& in, size_t sequence) const {
    const int32_t slot = in.adapters.empty() ? -1 : in.adapters[sequence];
    if (slot < 0) return "";
    if (slot >= static_cast<int32_t>(adapters_.size()) || adapters_[static_cast<size_t>(slot)] == nullptr) {
      ADD_FAILURE() << "the slot " << slot << " holds no adapter";
      return "";
    }
    return adapters_[static_cast<size_t>(slot)]->digest();
  }

  int64_t block_size_;
  models::ModelInfo info_;
  models::LoadStats stats_;
  std::vector<Slot> slots_;
  std::vector<std::unique_ptr<models::Adapter>> adapters_;
};

}  // namespace phalanx::engine
