#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "phalanx/comm/group.h"
#include "phalanx/ops/ops.h"
#include "phalanx/quant/format.h"
#include "phalanx/tensor/cut.h"

namespace phalanx::models {

// Attention over one compressed row of keys and values per token (MLA,
// https://arxiv.org/abs/2405.04434, 2.1), which every rank stores.
struct LatentAttention {
  int64_t q_lora_rank = 0;   // 0: queries straight from the hidden state
  int64_t kv_lora_rank = 0;  // 0: no such attention
  int64_t qk_nope_head_dim = 0;
  int64_t qk_rope_head_dim = 0;
  int64_t v_head_dim = 0;
  bool bias = false;  // of q_a_proj and kv_a_proj_with_mqa
};

// A mixture of experts, in some of the layers.
struct Experts {
  int64_t count = 0;
  int64_t per_token = 0;
  int64_t intermediate_size = 0;         // of each
  int64_t shared_intermediate_size = 0;  // of the expert that sees every token, 0 = none
  bool shared_gate = false;              // its output is weighed by a sigmoid
  bool correction_bias = false;          // added to the scores for the choice alone
  std::vector<bool> in_layer;            // one per layer
  std::string block = "mlp";             // names in the checkpoint, below model.layers.N.
  std::string gate = "gate_proj";        // below block.experts.N.
  std::string up = "up_proj";
  std::string down = "down_proj";
  std::string shared = "shared_experts";             // below block.
  std::string correction = "gate.e_score_correction_bias";  // below block.
};

// What engine and start-up report may know of a model.
struct ModelInfo {
  std::string model_type;
  tensor::DType dtype = tensor::DType::kBF16;  // of the checkpoint
  tensor::DType act = tensor::DType::kBF16;    // of activations
  int64_t num_layers = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;
  int64_t max_position_embeddings = 0;
  bool tied_embeddings = false;
  bool qkv_bias = false;     // of the q, k and v projections
  bool output_bias = false;  // of the attention's output projection
  bool mlp_bias = false;
  bool head_bias = false;    // of lm_head
  bool qk_norm = false;      // RMS norm over each head of q and k
  LatentAttention latent;
  Experts experts;
  int64_t parameter_bytes = 0;  // whole checkpoint, as stored
  // How the linear layers are stored; nullptr: all float.
  std::shared_ptr<const quant::Formats> formats;
};

// Who computes which outputs. A pure function of (ModelInfo, weights), the same on every node.
struct RankLayout {
  tensor::Range query_heads;
  tensor::Range kv_heads;       // stored (repeated where ranks share one)
  tensor::Range hidden_rows;    // of o_proj and down_proj
  tensor::Range mlp_rows;       // of gate and up
  tensor::Range vocab_rows;     // of the embedding and the head
  tensor::Range compressed_rows;  // of MLA's q_a_proj and kv_a_proj_with_mqa, one after the other
  tensor::Range experts;          // held here
  tensor::Range expert_rows;      // of gate and up of these experts
  tensor::Range expert_outputs;   // of their down
  tensor::Range shared_rows;      // of gate and up of the shared expert
};
// weights: one per rank. moe_ep: runs of neighbouring ranks that hold whole experts; 1: every rank
// holds rows of all of them. Throws Error(kInvalidArgument) when there are more ranks than query
// heads, when moe_ep does not divide the ranks, is more than the experts, or the model has none.
[[nodiscard]] std::vector<RankLayout> plan_layout(const ModelInfo& info,
                                                  std::span<const double> weights,
                                                  int64_t moe_ep = 1);

// Memory one rank needs, computed from the plan alone, before any weight is read.
struct MemoryNeed {
  int64_t weight_bytes = 0;       // packed
  int64_t workspace_bytes = 0;    // activations, scratch, tables
  int64_t kv_bytes_per_block = 0;
  int64_t read_bytes = 0;         // to be read from disk for this rank
  int64_t adapter_bytes = 0;      // of max_adapters of max_adapter_rank, all that they may adapt
};

// What the KV cache is to hold.
enum class KvDtype : uint8_t {
  kCheckpoint,  // int8 where the checkpoint has scales for that (C8), else what activations are
  kBf16,
  kInt8,
};

struct ModelOptions {
  std::string directory;
  ops::Isa isa = ops::Isa::kRef;
  int64_t max_step_tokens = 0;   // largest number of tokens in one step
  int64_t max_step_rows = 0;     // largest number of sample rows in one step
  int64_t max_sequence = 0;      // longest sequence (prompt + output)
  int64_t block_size = 128;
  KvDtype kv = KvDtype::kCheckpoint;
  std::vector<double> weights;   // of the ranks, for the cut; its size is the world size
  int64_t moe_ep = 1;            // see plan_layout
  int rank = 0;
  int64_t max_adapters = 0;      // slots for LoRA adapters
  int64_t max_adapter_rank = 0;  // of their layers
  // Sees the input of every linear layer (ops::Context::Options::observer); lent.
  const std::function<void(const ops::MatrixView& x)>* observer = nullptr;
  int threads = 1;               // of the pool that load_model will be given
  int weight_memory = -1;        // weights::create_arena_memory(), lent; sealed: nothing is read.
                                 // -1: the model's own
};

struct StepInputs {
  std::span<const int32_t> tokens;      // [T]
  std::span<const int32_t> positions;   // [T]
  std::span<const int32_t> slots;       // [T] KV slot of each token
  std::span<const ops::SequenceSlice> sequences;
  std::span<const int32_t> sample_rows; // [R] indices into tokens
  std::span<const int32_t> adapters;    // slot of each sequence's adapter, -1: none; empty: none at all
};

// A LoRA adapter as one rank holds it. Immutable.
class Adapter {
 public:
  virtual ~Adapter() = default;
  [[nodiscard]] const std::string& digest() const { return digest_; }  // of its files, whole

 protected:
  explicit Adapter(std::string digest) : digest_(std::move(digest)) {}

 private:
  std::string digest_;
};

struct LoadStats {
  int64_t tensors = 0;
  int64_t bytes_read = 0;
  double seconds = 0;
};

// Time of one forward, by what it was spent on.
struct StepTimes {
  int64_t compute_ns = 0;
  int64_t communication_ns = 0;  // transfer and waiting, from the group's statistics
};

// One rank's part of a model. Used from one thread.
class Model {
 public:
  virtual ~Model() = default;
  [[nodiscard]] virtual const ModelInfo& info() const = 0;
  [[nodiscard]] virtual const LoadStats& load_stats() const = 0;
  // Allocates the paged KV cache. Once, before the first forward.
  virtual void allocate_kv(int64_t blocks) = 0;
  // All ranks of `group` call it with equal inputs. logits: f32 [R, vocab] on rank 0, nullptr on
  // others. Throws what the group throws.
  virtual void forward(const StepInputs& inputs, float* logits) = 0;
  [[nodiscard]] virtual StepTimes last_times() const = 0;  // of the last forward
  // Reads this rank's part of an adapter (PEFT's layout). From any thread, also beside forward(). Throws
  // Error with all problems.
  [[nodiscard]] virtual std::unique_ptr<Adapter> read_adapter(const std::string& directory) const = 0;
  // Puts it into a slot, from where forward() uses it; nullptr: empties the slot.
  virtual void set_adapter(int64_t slot, std::unique_ptr<Adapter> adapter) = 0;
};

// Reads config.json only. Throws Error naming file, key, found, expected; an unknown model_type is
// refused with the list of known ones.
[[nodiscard]] ModelInfo read_model_info(const std::string& directory);

// Verifies the headers of all weight files against the model (names, shapes, dtypes, offsets), all
// problems at once, without reading weights. Part of every start.
void check_checkpoint(const std::string& directory);

[[nodiscard]] MemoryNeed memory_need(const ModelInfo& info, const ModelOptions& options);

struct AdapterFacts {
  int64_t max_rank = 0;
  std::string digest;  // as Adapter::digest
};
// Verifies an adapter's configuration and the headers of its weights against the model, and reads all
// of it once for its digest. Throws Error(kInvalidArgument) with all problems.
[[nodiscard]] AdapterFacts check_adapter(const ModelInfo& info, const std::string& directory,
                                         int64_t max_rank);

// Reads and packs this rank's part. progress(bytes done, bytes total), called from the loading
// thread. `group` and `pool` must outlive the model.
[[nodiscard]] std::unique_ptr<Model> load_model(
    const ModelOptions& options, comm::Group& group, ThreadPool& pool,
    const std::function<void(int64_t, int64_t)>& progress);

}  // namespace phalanx::models
