#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <variant>
#include <vector>

#include "phalanx/layers/attention.h"
#include "phalanx/layers/kv_cache.h"
#include "phalanx/layers/latent_attention.h"
#include "phalanx/layers/linear.h"
#include "phalanx/layers/lora.h"
#include "phalanx/layers/memory.h"
#include "phalanx/layers/moe.h"
#include "phalanx/layers/vocab.h"
#include "phalanx/models/adapter.h"
#include "phalanx/models/decoder_config.h"
#include "phalanx/weights/arena.h"

namespace phalanx::models {

// The weights of one rank, as layers. Made with a plan without base it only declares.
struct DecoderLayers {
  struct Norm {
    const float* weight = nullptr;  // [hidden]
    const float* bias = nullptr;    // [hidden], or nullptr
  };
  struct Layer {
    Norm attention_norm;
    std::variant<layers::Attention, layers::LatentAttention> attention;
    layers::ShardedLinear output;
    Norm mlp_norm;
    std::variant<layers::GatedMlp, layers::Moe> mlp;

    // Own columns of the attention's output.
    [[nodiscard]] const layers::CutColumns& attention_columns() const;
  };
  DecoderLayers(layers::WeightPlan& plan, const DecoderConfig& config,
                std::span<const RankLayout> layout, int64_t max_step_tokens, int rank);
  layers::Vocab vocab;
  std::vector<Layer> layers;
  Norm final_norm;
};

// The activations of one step.
struct Activations {
  Activations(layers::Carver& carver, const DecoderConfig& config,
              std::span<const RankLayout> layout, const ModelOptions& options);
  layers::MatrixView residual;    // f32 [max_step_tokens, hidden], equal on all ranks
  layers::MatrixView normed;      // act [max_step_tokens, hidden]
  layers::MatrixView qkv;         // act [max_step_tokens, own q, k and v columns]
  layers::MatrixView attention;   // act [max_step_tokens, attention_width()], gathered
  layers::MatrixView delta;       // act [max_step_tokens, hidden], gathered
  layers::MatrixView mlp;         // act [max_step_tokens, intermediate], gathered
  layers::MatrixView sampled_residual;   // f32 [max_step_rows, hidden]
  layers::MatrixView sampled_attention;  // act [max_step_rows, attention_width()]
  layers::MatrixView own_logits;         // f32 [max_step_rows, own vocabulary], not on rank 0
  std::optional<layers::LatentAttention::Scratch> latent;
  std::optional<layers::Moe::Scratch> moe;
  std::optional<layers::LoraScratch> lora;  // where the model takes adapters
};

// Columns of the attention's output.
[[nodiscard]] int64_t attention_width(const ModelInfo& info);

// Adds what keeps `checkpoint`, its experts named (name_experts), from being loaded.
void verify_checkpoint(const ModelInfo& info, const weights::Checkpoint& checkpoint,
                       Problems& problems);
[[nodiscard]] int64_t parameter_bytes(const ModelInfo& info);

class DecoderModel final : public Model {
 public:
  // Verifies, reads and packs. group and pool are lent.
  DecoderModel(const DecoderConfig& config, std::span<const std::string_view> known_extras,
               const ModelOptions& options, comm::Group& group, ThreadPool& pool,
               const std::function<void(int64_t, int64_t)>& progress);

  [[nodiscard]] const ModelInfo& info() const override { return config_.info; }
  [[nodiscard]] const LoadStats& load_stats() const override { return load_stats_; }
  [[nodiscard]] StepTimes last_times() const override { return last_times_; }
  void allocate_kv(int64_t blocks) override;
  void forward(const StepInputs& inputs, float* logits) override;
  [[nodiscard]] std::unique_ptr<Adapter> read_adapter(const std::string& directory) const override;
  void set_adapter(int64_t slot, std::unique_ptr<Adapter> adapter) override;

 private:
  // Which rows of the step, and of those to sample, use which adapter.
  void place_adapters(const StepInputs& inputs);
  void run_attention(const DecoderLayers::Layer& layer, size_t index, const StepInputs& inputs,
                     const layers::MatrixView& x, const layers::MatrixView& out,
                     const layers::LoraSite& lora);
  void run_mlp(const DecoderLayers::Layer& layer, const layers::MatrixView& x,
               const layers::MatrixView& inner, const layers::MatrixView& out,
               const layers::LoraSite& lora);
  void run_layers(const StepInputs& inputs);
  void run_head(int64_t rows, float* logits);

  DecoderConfig config_;
  ModelOptions options_;
  RankLayout own_;
  comm::Group& group_;
  ops::Context ctx_;
  ops::RopeTable rope_;
  layers::Memory workspace_;
  std::unique_ptr<Activations> activations_;
  std::unique_ptr<weights::Arena> arena_;
  std::unique_ptr<DecoderLayers> layers_;
  layers::KvCache kv_;
  std::vector<std::unique_ptr<Adapter>> adapters_;  // by slot
  layers::LoraRows adapted_rows_;
  layers::LoraRows adapted_samples_;
  LoadStats load_stats_;
  StepTimes last_times_;
};

}  // namespace phalanx::models
