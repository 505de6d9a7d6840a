#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "phalanx/base/error.h"

namespace phalanx::weights {

// What adapter_config.json of a LoRA adapter (PEFT, https://huggingface.co/docs/peft) says: which
// linear layers it adds B A to, of which rank, and how strongly. Everything that would change the
// arithmetic in another way (DoRA, trained biases, whole modules beside it, ...) is refused.
class AdapterConfig {
 public:
  // Adds everything that is wrong to `problems`, naming `path`; of use only if nothing was.
  AdapterConfig(const std::string& path, Problems& problems);
  AdapterConfig(AdapterConfig&&) noexcept;
  AdapterConfig& operator=(AdapterConfig&&) noexcept;
  ~AdapterConfig();

  // Whether a module ("model.layers.3.self_attn.q_proj") is adapted.
  [[nodiscard]] bool targets(std::string_view module) const;
  // Of an adapted module. Adds a problem where two patterns say different things.
  [[nodiscard]] int64_t rank_of(std::string_view module, Problems& problems) const;
  // What B A is multiplied by: alpha / rank, or alpha / sqrt(rank) with use_rslora.
  [[nodiscard]] double scale_of(std::string_view module, Problems& problems) const;
  // The highest that some module may have.
  [[nodiscard]] int64_t max_rank() const;
  // target_modules as written, for messages.
  [[nodiscard]] const std::string& targets_text() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

inline constexpr int64_t kMostAdapterRank = 1024;

}  // namespace phalanx::weights
