#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "phalanx/comm/bootstrap.h"
#include "phalanx/engine/step_plan.h"
#include "phalanx/models/model.h"
#include "phalanx/net/tls_material.h"

namespace phalanx::apps {

// All that a rank process must know before it connects; sent by its supervisor as the first
// message.
struct RankSpec {
  models::ModelOptions model;
  std::optional<models::ModelOptions> draft;  // the draft model, whole on this rank (rank 0); its rows
                                              // are the sequences that may draft in one step
  int64_t vocab_size = 0;
  int64_t max_blocks = 0;          // the KV cache will have no more; sizes the step channel
  uint64_t generation = 0;
  int threads = 1;
  std::vector<int> cpus;           // to pin to; empty: not pinned
  std::string logits_folder;
  int log_level = 1;

  // What plans are held against; the blocks of the KV cache are known last.
  [[nodiscard]] engine::StepLimits limits(int64_t blocks) const;
};

[[nodiscard]] nlohmann::json to_json(const RankSpec& spec);
[[nodiscard]] RankSpec rank_spec_from_json(const nlohmann::json& j);
[[nodiscard]] nlohmann::json to_json(const std::vector<comm::Member>& members);
[[nodiscard]] std::vector<comm::Member> members_from_json(const nlohmann::json& j);
[[nodiscard]] nlohmann::json to_json(const net::TlsFiles& files);
[[nodiscard]] net::TlsFiles tls_files_from_json(const nlohmann::json& j);
[[nodiscard]] std::string token_to_hex(const comm::Token& token);
[[nodiscard]] comm::Token token_from_hex(const std::string& hex);

// Descriptors of a rank process, at these numbers; absent ones are closed there.
inline constexpr int kControlFd = 3;
inline constexpr int kPageFd = 4;
inline constexpr int kListenerFd = 5;     // ranks of several nodes
inline constexpr int kNodeMemoryFd = 6;   // several ranks on the node
inline constexpr int kStepChannelFd = 7;  // rank 0
inline constexpr int kArenaFd = 8;        // memory for the packed weights, kept by the node process
inline constexpr int kDraftArenaFd = 9;   // the same for the draft model, rank 0
inline constexpr int kLastRankFd = 9;

}  // namespace phalanx::apps
