#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/base/unique_fd.h"
#include "phalanx/weights/adapter_config.h"
#include "phalanx/weights/safetensors.h"

namespace phalanx::weights {

// A linear layer of a base model: outputs and inputs.
struct AdaptedModule {
  std::string name;  // "model.layers.3.self_attn.q_proj"
  int64_t rows = 0;
  int64_t k = 0;
};

// The files of one LoRA adapter as PEFT saves it: adapter_config.json and adapter_model.safetensors
// with base_model.model.<module>.lora_A.weight [r, k] and lora_B.weight [rows, r], f32, f16, bf16.
// Headers are verified, values are read on demand. Immutable after construction: any thread.
class LoraFiles {
 public:
  struct Pair {
    TensorEntry a, b;
    int64_t rank = 0;
    double scale = 0;  // of B A
  };

  // modules: those that may be adapted. why_not: of another module, what keeps it from that, a
  // sentence's middle. max_rank: no layer may have more. Adds all that is wrong to `problems` (of
  // very many tensors the first ones), and is of use only if nothing was.
  LoraFiles(const std::string& directory, std::span<const AdaptedModule> modules,
            const std::function<std::string(std::string_view)>& why_not, int64_t max_rank,
            Problems& problems);

  [[nodiscard]] const std::string& directory() const { return directory_; }
  // nullptr: the adapter leaves this module alone.
  [[nodiscard]] const Pair* find(std::string_view module) const;
  [[nodiscard]] int64_t max_rank() const { return max_rank_; }  // of all pairs
  // Rows [row_begin, + rows) as stored. Throws Error(kDataLoss) when the file has shrunk,
  // kUnavailable on a read error.
  void read_rows(const TensorEntry& entry, int64_t row_begin, int64_t rows, std::byte* out) const;
  // Calls use(bytes) for both files from beginning to end, in pieces of 1 MiB. Throws as read_rows.
  void for_bytes(const std::function<void(std::string_view)>& use) const;

 private:
  void add_tensors(std::vector<TensorEntry> entries, const AdapterConfig& config,
                   std::span<const AdaptedModule> modules,
                   const std::function<std::string(std::string_view)>& why_not, int64_t max_rank,
                   Problems& problems);

  std::string directory_;
  std::string config_path_, path_;
  UniqueFd fd_;
  std::map<std::string, Pair, std::less<>> pairs_;  // by module
  int64_t max_rank_ = 0;
};

}  // namespace phalanx::weights
