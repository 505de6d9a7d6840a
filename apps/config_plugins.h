#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "apps/config.h"

namespace phalanx::apps {

// plugin_params of config.json: an object, or a string with one. Its plugin_type is a comma list of
//   prefix_cache, splitfuse      on in any case
//   la                           speculation by prompt look-up, level - 1 tokens (level 3-16, 4)
//   memory_decoding              the same, decoding_length tokens (1-16, 16)
//   ngram                        the same, num_speculative_tokens (1-16, 5), looking up runs of
//                                prompt_lookup_max (1-16, 4) to prompt_lookup_min (1-16, 2) tokens
//   draft_model                  speculation by a draft model, the checkpoint in the directory `model`,
//                                num_speculative_tokens (1-16, 5)
//   mtp                          refused by name: layers of multi-token prediction are not used
// and, of our own, "prefix_cache": false and "chunked_prefill": false turn these off. `where` names
// the key in messages.
void read_plugin_params(const nlohmann::json& value, const std::string& where, Problems& problems,
                        std::vector<std::string>& ignored, PluginConfig& plugins);

// --speculative-config: {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4,
// "prompt_lookup_min": 2} or {"method": "draft_model", "model": DIR, "num_speculative_tokens": 5}, as
// vLLM's (whose "method" may be left away beside a "model").
void read_speculative_config(const std::string& text, Problems& problems,
                             std::vector<std::string>& ignored, PluginConfig& plugins);

// --draft-model and --draft-tokens.
void read_draft_options(const std::string& model, int64_t tokens, Problems& problems,
                        PluginConfig& plugins);

// The draft model lies whole on rank 0, so the node of rank 0 alone looks at it and needs its files.
[[nodiscard]] bool runs_draft_model(const NodeConfig& config);

}  // namespace phalanx::apps
