#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "phalanx/api/http_server.h"
#include "phalanx/engine/engine.h"

namespace phalanx::text {
class Tokenizer;
class ChatTemplate;
}  // namespace phalanx::text

namespace phalanx::api {

// Defaults of generation_config.json, applied where a request says nothing.
struct GenerationDefaults {
  std::optional<float> temperature, top_p, repetition_penalty;
  std::optional<int32_t> top_k;
  bool do_sample = true;                    // false: greedy unless the request sets temperature
  std::vector<int32_t> eos_token_ids;       // of generation_config.json, else config.json
};

// What the dialects need to know of the instance.
struct ServiceOptions {
  std::string model_name;
  std::vector<std::string> model_aliases;   // other names that requests may use
  std::string model_path;
  std::string model_dtype;                  // "bfloat16", ...
  int64_t max_sequence = 2560, max_input_tokens = 2048, max_output_tokens = 512;
  int64_t max_position_embeddings = 0, vocab_size = 0;
  int64_t max_batch = 200, max_prefill_batch = 50, max_prefill_tokens = 8192, max_n = 128;
  int64_t max_link_num = 1000;
  int64_t npu_mem_size = -1, cpu_mem_size = 0, world_size = 1, cache_block_size = 128;
  int max_json_depth = 10;
  int64_t max_request_mb = 40;
  int truncation = 0;                       // -1 right, 0 refuse, 1 left
  double token_timeout_s = 600, e2e_timeout_s = 600;
  GenerationDefaults defaults;
  std::string model_type;                   // of config.json
  std::string call_format;                  // models.<type>.tool_call_parser; empty: the family's own
  bool enable_reasoning = false;            // models.<type>.enable_reasoning
  std::optional<bool> thinks;               // enable_thinking of tokenizer_config.json
  bool full_text = false;                   // fullTextEnabled
  bool request_journal = false;             // GET /v1/requests/ID is there
  [[nodiscard]] bool is_model(std::string_view name) const {
    return name == model_name ||
           std::find(model_aliases.begin(), model_aliases.end(), name) != model_aliases.end();
  }
  // Whether a LoRA adapter of that name is loaded. Null: there are none. Set by Core.
  std::function<bool(std::string_view)> knows_adapter;
  [[nodiscard]] bool is_adapter(std::string_view name) const {
    return knows_adapter && knows_adapter(name);
  }
  // Throws Error(kInvalidArgument) with all that keeps the adapter at `path` from being loaded. Null:
  // only the ranks say.
  std::function<void(const std::string& path)> check_adapter;
};

// State of the whole instance as the health routes tell it.
// kRecovering: a rank or node is lost, requests are accepted and wait for its return.
enum class InstanceState { kStarting, kServing, kRecovering, kDraining, kStopped, kFailed };
struct InstanceHealth {
  InstanceState state = InstanceState::kStarting;
  std::vector<std::string> lost;            // addresses of nodes without contact
  std::string reason;                       // for kFailed and kRecovering: which node, which rank, why
};

// The routes of an instance. Stop the server before this goes (what still runs afterwards finds a
// stopped engine); the engine must live until then.
class Service {
 public:
  Service(ServiceOptions options, engine::Engine& engine,
          std::shared_ptr<const text::Tokenizer> tokenizer,
          std::shared_ptr<const text::ChatTemplate> chat_template /* may be null */,
          std::function<InstanceHealth()> health,
          std::function<std::string()> status_json /* ranks, layout, ledger */,
          std::function<void()> stop /* GET /stopService */);
  ~Service();
  // Mounts every route on its plane. Before server.start().
  void mount(Server& server);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace phalanx::api
