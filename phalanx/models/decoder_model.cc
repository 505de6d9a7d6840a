#include "phalanx/models/decoder_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "phalanx/base/clock.h"
#include "phalanx/base/log.h"
#include "phalanx/models/expert_names.h"
#include "phalanx/models/kv_format.h"

namespace phalanx::models {
namespace {

using layers::MatrixView;
using layers::Range;

// Of MLA's norms, whatever rms_norm_eps says (DeepseekV2RMSNorm's default).
constexpr float kLatentNormEps = 1e-6F;

// One field of every rank's layout.
std::vector<Range> ranges(std::span<const RankLayout> layout, Range RankLayout::* field) {
  std::vector<Range> result;
  for (const RankLayout& rank : layout) result.push_back(rank.*field);
  return result;
}

const RankLayout& of_rank(std::span<const RankLayout> layout, int rank) {
  PHALANX_CHECK(rank >= 0 && static_cast<size_t>(rank) < layout.size());
  return layout[static_cast<size_t>(rank)];
}

int64_t qkv_columns(const ModelInfo& info, const RankLayout& own) {
  if (info.latent.kv_lora_rank > 0) return 0;
  return (own.query_heads.size() + 2 * own.kv_heads.size()) * info.head_dim;
}

ops::Context::Options context_options(const ModelInfo& info, const RankLayout& own,
                                      const ModelOptions& options) {
  const LatentAttention& latent = info.latent;
  const Experts& experts = info.experts;
  return {.isa = options.isa,
          .max_tokens = options.max_step_tokens,
          .max_k = std::max({info.hidden_size, info.intermediate_size, attention_width(info),
                             latent.q_lora_rank, experts.intermediate_size,
                             experts.shared_intermediate_size}),
          .max_rows = std::max({own.vocab_rows.size(), 2 * own.mlp_rows.size(),
                                own.hidden_rows.size(), qkv_columns(info, own),
                                own.compressed_rows.size(),
                                own.query_heads.size() *
                                    (latent.qk_nope_head_dim + latent.qk_rope_head_dim),
                                experts.count, 2 * own.expert_rows.size(),
                                own.expert_outputs.size(), 2 * own.shared_rows.size()}),
          .max_heads = own.query_heads.size(),
          .max_head_dim = info.head_dim,
          .max_context = options.max_sequence,
          .observer = options.observer,
          .quantised = info.formats != nullptr};
}

layers::KvCache::Shape kv_shape(const ModelInfo& info, const RankLayout& own,
                                const ModelOptions& options) {
  const KvFormat format = kv_format(info, options.kv);
  return {.layers = info.num_layers,
          .kv_heads = own.kv_heads.size(),
          .head_dim = info.head_dim,
          .block_size = options.block_size,
          .dtype = format.dtype,
          .shared = info.latent.kv_lora_rank > 0,
          .row_scales = format.row_scales};
}

layers::LatentAttention::Shape latent_shape(const DecoderConfig& config, const std::string& name) {
  const LatentAttention& latent = config.info.latent;
  return {.name = name,
          .hidden = config.info.hidden_size,
          .heads = config.info.num_attention_heads,
          .q_lora_rank = latent.q_lora_rank,
          .kv_lora_rank = latent.kv_lora_rank,
          .nope_head_dim = latent.qk_nope_head_dim,
          .rope_head_dim = latent.qk_rope_head_dim,
          .v_head_dim = latent.v_head_dim,
          .bias = latent.bias,
          .norm_eps = kLatentNormEps,
          .interleaved = config.rotary.interleaved,
          .scale = config.attention_scale};
}

layers::Moe::Shape moe_shape(const DecoderConfig& config, const std::string& layer) {
  const Experts& experts = config.info.experts;
  return {.name = layer + experts.block,
          .gate = experts.gate,
          .up = experts.up,
          .down = experts.down,
          .shared = experts.shared,
          .correction = experts.correction_bias ? experts.correction : "",
          .hidden = config.info.hidden_size,
          .experts = experts.count,
          .per_token = experts.per_token,
          .intermediate = experts.intermediate_size,
          .shared_intermediate = experts.shared_intermediate_size,
          .shared_gate = experts.shared_gate,
          .shared_bias = config.info.mlp_bias,
          .rule = config.routing};
}

layers::ExpertLayout expert_layout(std::span<const RankLayout> layout) {
  layers::ExpertLayout result{.experts = ranges(layout, &RankLayout::experts),
                              .inner = ranges(layout, &RankLayout::expert_rows),
                              .outer = ranges(layout, &RankLayout::expert_outputs),
                              .shared = ranges(layout, &RankLayout::shared_rows),
                              .hidden = ranges(layout, &RankLayout::hidden_rows)};
  // Ranks of the first run hold the same experts.
  const auto same = std::count(result.experts.begin(), result.experts.end(), result.experts[0]);
  if (static_cast<size_t>(same) < layout.size()) result.moe_tp = static_cast<int>(same);
  return result;
}

// Names of what all ranks together ask for.
std::set<std::string, std::less<>> names_of_all(const ModelInfo& info) {
  layers::WeightPlan plan(info.dtype, ops::Isa::kRef, nullptr, info.formats.get());
  const std::vector<double> alone = {1.0};
  const DecoderLayers declared(plan, {.info = info}, plan_layout(info, alone), 0, 0);
  return plan.names();
}

// What belongs to a quantised layer and is not needed: the static scales of PDMIX, beside the dynamic
// ones; shapes, which the model's own replace; the order of columns that are in order.
bool needless(const ModelInfo& info, std::string_view tensor) {
  const size_t dot = tensor.rfind('.');
  if (info.formats == nullptr || dot == std::string_view::npos) return false;
  const quant::LinearFormat* format = info.formats->find(tensor.substr(0, dot));
  const std::string_view part = tensor.substr(dot);
  if (format == nullptr) return false;
  switch (format->scheme) {
    case quant::Scheme::kMsW8A8Dynamic:
      return part == ".input_scale" || part == ".input_offset" || part == ".quant_bias" ||
             part == ".deq_scale";
    case quant::Scheme::kMsW8A8: return part == ".bias";
    case quant::Scheme::kCtPacked: return part == ".weight_shape";
    case quant::Scheme::kGptq: return part == ".g_idx";
    default: return false;
  }
}

layers::MatrixView rows_or_none(const layers::MatrixView& matrix, int64_t rows) {
  return matrix.rows_of(0, std::min(matrix.rows, rows));
}

void copy_rows(const MatrixView& from, std::span<const int32_t> rows, const MatrixView& to) {
  const size_t bytes = static_cast<size_t>(from.cols) * tensor::dtype_bytes(from.dtype);
  for (size_t r = 0; r < rows.size(); ++r)
    std::memcpy(to.rows_of(static_cast<int64_t>(r), 1).data, from.rows_of(rows[r], 1).data, bytes);
}

}  // namespace

DecoderLayers::DecoderLayers(layers::WeightPlan& plan, const DecoderConfig& config,
                             std::span<const RankLayout> layout, int64_t max_step_tokens, int rank)
    : vocab(plan,
            {.embedding = "model.embed_tokens.weight",
             .head = "lm_head.weight",
             .vocab = config.info.vocab_size,
             .hidden = config.info.hidden_size,
             .tied = config.info.tied_embeddings,
             .bias = config.info.head_bias ? "lm_head.bias" : ""},
            ranges(layout, &RankLayout::vocab_rows), config.info.dtype, max_step_tokens, rank) {
  const ModelInfo& info = config.info;
  const auto heads = ranges(layout, &RankLayout::query_heads);
  const auto hidden = ranges(layout, &RankLayout::hidden_rows);
  const auto mlp_rows = ranges(layout, &RankLayout::mlp_rows);
  const Range kv_heads = of_rank(layout, rank).kv_heads;
  const auto norm = [&](const std::string& name) {
    return Norm{.weight = plan.vector({{name + ".weight", info.hidden_size, 0, {0, info.hidden_size}}}),
                .bias = plan.norm_bias(name, info.hidden_size)};
  };
  const auto compressed = ranges(layout, &RankLayout::compressed_rows);
  const auto attention = [&](const std::string& name, size_t layer)
      -> std::variant<layers::Attention, layers::LatentAttention> {
    if (info.latent.kv_lora_rank > 0)
      return layers::LatentAttention(plan, latent_shape(config, name), heads, compressed, info.act,
                                     rank);
    return layers::Attention(
        plan,
        {.name = name,
         .hidden = info.hidden_size,
         .heads = info.num_attention_heads,
         .kv_heads = info.num_key_value_heads,
         .head_dim = info.head_dim,
         .bias = info.qkv_bias,
         .norm = info.qk_norm,
         .norm_eps = config.rms_norm_eps,
         .interleaved = config.rotary.interleaved ? config.rotary.rotary_dim : 0,
         .scale = config.attention_scale,
         .window = config.windows.empty() ? 0 : config.windows[layer],
         .kv_scales = info.formats != nullptr && info.formats->kv_int8,
         .kv_offsets = info.formats != nullptr && info.formats->kv_offsets},
        heads, kv_heads, info.act, rank);
  };
  const auto mlp = [&](const std::string& name,
                       size_t layer) -> std::variant<layers::GatedMlp, layers::Moe> {
    if (info.experts.count > 0 && info.experts.in_layer[layer])
      return layers::Moe(plan, moe_shape(config, name), expert_layout(layout), info.act, rank);
    return layers::GatedMlp(plan,
                            {.name = name + "mlp",
                             .hidden = info.hidden_size,
                             .intermediate = info.intermediate_size,
                             .bias = info.mlp_bias},
                            mlp_rows, hidden, info.act, rank);
  };
  for (int64_t i = 0; i < info.num_layers; ++i) {
    const std::string name = fmt::format("model.layers.{}.", i);
    const auto index = static_cast<size_t>(i);
    layers.push_back({.attention_norm = norm(name + "input_layernorm"),
                      .attention = attention(name + "self_attn", index),
                      .output = layers::ShardedLinear(plan,
                                                      {.name = name + "self_attn.o_proj",
                                                       .rows = info.hidden_size,
                                                       .k = attention_width(info),
                                                       .bias = info.output_bias},
                                                      hidden, info.act, rank),
                      .mlp_norm = norm(name + "post_attention_layernorm"),
                      .mlp = mlp(name, index)});
  }
  final_norm = norm("model.norm");
}

const layers::CutColumns& DecoderLayers::Layer::attention_columns() const {
  return std::visit([](const auto& a) -> const layers::CutColumns& { return a.columns(); },
                    attention);
}

int64_t attention_width(const ModelInfo& info) {
  return info.num_attention_heads *
         (info.latent.kv_lora_rank > 0 ? info.latent.v_head_dim : info.head_dim);
}

Activations::Activations(layers::Carver& carver, const DecoderConfig& config,
                         std::span<const RankLayout> layout, const ModelOptions& options) {
  const ModelInfo& info = config.info;
  const RankLayout& own = of_rank(layout, options.rank);
  const int64_t tokens = options.max_step_tokens;
  const int64_t rows = options.max_step_rows;
  const int64_t width = attention_width(info);
  residual = carver.matrix(tokens, info.hidden_size, tensor::DType::kF32);
  normed = carver.matrix(tokens, info.hidden_size, info.act);
  qkv = carver.matrix(tokens, qkv_columns(info, own), info.act);
  attention = carver.matrix(tokens, width, info.act);
  delta = carver.matrix(tokens, info.hidden_size, info.act);
  const bool all_experts =
      info.experts.count > 0 &&
      std::all_of(info.experts.in_layer.begin(), info.experts.in_layer.end(),
                  [](bool experts) { return experts; });
  mlp = carver.matrix(all_experts ? 0 : tokens, info.intermediate_size, info.act);
  sampled_residual = carver.matrix(rows, info.hidden_size, tensor::DType::kF32);
  sampled_attention = carver.matrix(rows, width, info.act);
  own_logits = carver.matrix(options.rank == 0 ? 0 : rows, own.vocab_rows.size(),
                             tensor::DType::kF32);
  if (info.latent.kv_lora_rank > 0)
    latent.emplace(carver, latent_shape(config, ""), own.query_heads.size(), tokens, info.act);
  if (info.experts.count > 0)
    moe.emplace(carver, moe_shape(config, ""), expert_layout(layout), tokens, info.act,
                options.rank);
  if (options.max_adapters > 0)
    lora.emplace(carver, lora_shape(info, own, options.max_adapter_rank));
}

void verify_checkpoint(const ModelInfo& info, const weights::Checkpoint& checkpoint,
                       Problems& problems) {
  layers::WeightPlan plan(info.dtype, ops::Isa::kRef, nullptr, info.formats.get());
  const std::vector<double> alone = {1.0};
  const DecoderLayers declared(plan, {.info = info}, plan_layout(info, alone), 0, 0);
  plan.verify(checkpoint, problems);
}

int64_t parameter_bytes(const ModelInfo& info) {
  layers::WeightPlan plan(info.dtype, ops::Isa::kRef, nullptr, info.formats.get());
  const std::vector<double> alone = {1.0};
  const DecoderLayers declared(plan, {.info = info}, plan_layout(info, alone), 0, 0);
  return plan.read_bytes();
}

MemoryNeed memory_need(const ModelInfo& info, const ModelOptions& options) {
  const auto layout = plan_layout(info, options.weights, options.moe_ep);
  const RankLayout& own = of_rank(layout, options.rank);
  layers::WeightPlan plan(info.dtype, options.isa, nullptr, info.formats.get());
  const DecoderLayers declared(plan, {.info = info}, layout, 0, options.rank);
  layers::Carver carver;
  const Activations activations(carver, {.info = info}, layout, options);
  const int64_t rope_dim =
      info.latent.kv_lora_rank > 0 ? info.latent.qk_rope_head_dim : info.head_dim;
  const int64_t rope_bytes =
      options.max_sequence * rope_dim * static_cast<int64_t>(sizeof(float));
  const int64_t tables =
      info.experts.count > 0
          ? layers::Moe::Scratch::table_bytes(moe_shape({.info = info}, ""), options.max_step_tokens)
          : 0;
  const int64_t adapter_bytes =
      options.max_adapters *
      bytes_of_adapter(info, own, options.max_adapter_rank, options.isa);
  return {.weight_bytes = plan.arena_bytes(),
          .workspace_bytes =
              carver.bytes() + rope_bytes + tables + layers::Vocab::table_bytes(options.max_step_tokens) +
              ops::Context::bytes_for(context_options(info, own, options), options.threads),
          .kv_bytes_per_block = kv_shape(info, own, options).bytes_per_block(),
          .read_bytes = plan.read_bytes(),
          .adapter_bytes = adapter_bytes};
}

DecoderModel::DecoderModel(const DecoderConfig& config,
                           std::span<const std::string_view> known_extras,
                           const ModelOptions& options, comm::Group& group, ThreadPool& pool,
                           const std::function<void(int64_t, int64_t)>& progress)
    : config_(config),
      options_(options),
      own_(of_rank(plan_layout(config.info, options.weights, options.moe_ep), options.rank)),
      group_(group),
      ctx_(context_options(config.info, own_, options), pool) {
  PHALANX_CHECK(group.size() == static_cast<int>(options.weights.size()) &&
                group.rank() == options.rank);
  const int64_t begin_ns = now_ns();
  Problems problems;
  weights::Checkpoint checkpoint(options.directory, problems);
  if (problems.empty()) name_experts(config.info, checkpoint, problems);
  if (problems.empty()) verify_checkpoint(config.info, checkpoint, problems);
  problems.throw_if_any(fmt::format("checkpoint {} cannot be used", options.directory));

  const auto layout = plan_layout(config.info, options.weights, options.moe_ep);
  layers::WeightPlan measured(config.info.dtype, options.isa, nullptr, config.info.formats.get());
  (void)DecoderLayers(measured, config, layout, 0, options.rank);
  arena_ = std::make_unique<weights::Arena>(measured.arena_bytes(), options.weight_memory);
  layers::WeightPlan plan(config.info.dtype, options.isa, arena_->data(),
                          config.info.formats.get());
  layers_ = std::make_unique<DecoderLayers>(plan, config, layout, options.max_step_tokens,
                                            options.rank);
  weights::WeightSource source(checkpoint);
  if (!arena_->filled()) {
    plan.load(source, pool, progress, [&] { (void)arena_->take_huge_pages(pool); });
    const auto of_others = names_of_all(config.info);
    (void)source.finish([&](std::string_view tensor) {
      return beyond_layers(tensor, config.info.num_layers) || needless(config.info, tensor) ||
             of_others.contains(tensor) ||
             std::any_of(known_extras.begin(), known_extras.end(), [&](std::string_view part) {
               return tensor.find(part) != std::string_view::npos;
             });
    });
    arena_->seal();
  }

  rope_ = layers::rope_table(config.rotary, options.max_sequence);
  layers::Carver measure;
  (void)Activations(measure, config, layout, options);
  workspace_ = layers::Memory(measure.bytes(), "the activations of this rank");
  layers::Carver carver(workspace_.data());
  activations_ = std::make_unique<Activations>(carver, config, layout, options);
  adapters_.resize(static_cast<size_t>(options.max_adapters));
  load_stats_ = {.tensors = source.tensors_asked(),
                 .bytes_read = source.bytes_read(),
                 .seconds = static_cast<double>(now_ns() - begin_ns) * 1e-9};
}

void DecoderModel::allocate_kv(int64_t blocks) {
  PHALANX_CHECK(!kv_.allocated() && blocks > 0);
  kv_ = layers::KvCache(kv_shape(config_.info, own_, options_), blocks);
}

void DecoderModel::forward(const StepInputs& inputs, float* logits) {
  const auto tokens = static_cast<int64_t>(inputs.tokens.size());
  const auto rows = static_cast<int64_t>(inputs.sample_rows.size());
  PHALANX_CHECK(kv_.allocated() && tokens > 0 && tokens <= options_.max_step_tokens &&
                rows <= options_.max_step_rows && inputs.positions.size() == inputs.tokens.size() &&
                inputs.slots.size() == inputs.tokens.size());
  const comm::GroupStats before = group_.stats();
  place_adapters(inputs);
  const int64_t begin_ns = now_ns();
  run_layers(inputs);
  if (rows > 0) run_head(rows, logits);
  const comm::GroupStats after = group_.stats();
  last_times_.communication_ns = static_cast<int64_t>(after.wait_ns + after.transfer_ns -
                                                      before.wait_ns - before.transfer_ns);
  last_times_.compute_ns =
      std::max<int64_t>(0, now_ns() - begin_ns - last_times_.communication_ns);
}

void DecoderModel::run_attention(const DecoderLayers::Layer& layer, size_t index,
                                 const StepInputs& inputs, const MatrixView& x,
                                 const MatrixView& out, const layers::LoraSite& lora) {
  const ops::KvLayer& kv = kv_.layer(static_cast<int64_t>(index));
  if (const auto* latent = std::get_if<layers::LatentAttention>(&layer.attention))
    return latent->forward(ctx_, group_, x, inputs.positions, inputs.slots, inputs.sequences, rope_,
                           kv, *activations_->latent, out);
  std::get<layers::Attention>(layer.attention)
      .forward(ctx_, x, inputs.positions, inputs.slots, inputs.sequences, rope_, kv,
               activations_->qkv.rows_of(0, x.rows), out, lora);
}

void DecoderModel::run_mlp(const DecoderLayers::Layer& layer, const MatrixView& x,
                           const MatrixView& inner, const MatrixView& out,
                           const layers::LoraSite& lora) {
  if (const auto* moe = std::get_if<layers::Moe>(&layer.mlp))
    return moe->forward(ctx_, group_, x, *activations_->moe, out);
  std::get<layers::GatedMlp>(layer.mlp).forward(ctx_, group_, x, inner, out, lora);
}

std::unique_ptr<Adapter> DecoderModel::read_adapter(const std::string& directory) const {
  return read_own_adapter(config_.info, own_, directory, options_.max_adapter_rank, options_.isa);
}

void DecoderModel::set_adapter(int64_t slot, std::unique_ptr<Adapter> adapter) {
  PHALANX_CHECK(slot >= 0 && slot < options_.max_adapters);
  adapters_[static_cast<size_t>(slot)] = std::move(adapter);
}

void DecoderModel::place_adapters(const StepInputs& inputs) {
  adapted_rows_.clear();
  adapted_samples_.clear();
  if (inputs.adapters.empty()) return;
  PHALANX_CHECK(inputs.adapters.size() == inputs.sequences.size());
  size_t sample = 0;
  for (size_t i = 0; i < inputs.sequences.size(); ++i) {
    const ops::SequenceSlice& s = inputs.sequences[i];
    const size_t first = sample;
    while (sample < inputs.sample_rows.size() &&
           inputs.sample_rows[sample] < s.token_begin + s.token_count)
      ++sample;
    const int32_t slot = inputs.adapters[i];
    if (slot < 0) continue;
    if (slot >= std::ssize(adapters_) || adapters_[static_cast<size_t>(slot)] == nullptr)
      throw Error(Code::kDataLoss, fmt::format("step plan: adapter is {}, a slot that is empty", slot));
    const auto layers = layers_of(*adapters_[static_cast<size_t>(slot)]);
    adapted_rows_.add(layers, s.token_begin, s.token_count);
    adapted_samples_.add(layers, static_cast<int64_t>(first), static_cast<int64_t>(sample - first));
  }
}

// Leaves the residual stream of the sample rows in sampled_residual.
void DecoderModel::run_layers(const StepInputs& inputs) {
  const auto tokens = static_cast<int64_t>(inputs.tokens.size());
  const auto rows = static_cast<int64_t>(inputs.sample_rows.size());
  const float eps = config_.rms_norm_eps;
  const Activations& a = *activations_;
  MatrixView residual = a.residual.rows_of(0, tokens);
  MatrixView attention = a.attention.rows_of(0, tokens);
  MatrixView normed = a.normed.rows_of(0, tokens);
  MatrixView delta = a.delta.rows_of(0, tokens);
  MatrixView mlp = rows_or_none(a.mlp, tokens);

  // The stored dtype is never wider than act, so a row of the exchange fits one of delta.
  layers_->vocab.embed(ctx_, group_, inputs.tokens, static_cast<std::byte*>(delta.data), residual);
  const DecoderLayers::Norm& first = layers_->layers.front().attention_norm;
  ops::rms_norm(ctx_, residual, first.weight, eps, normed, first.bias);
  for (size_t i = 0; i < layers_->layers.size(); ++i) {
    const DecoderLayers::Layer& layer = layers_->layers[i];
    const bool last = i + 1 == layers_->layers.size();
    // Only models that take adapters have the memory for it.
    const auto lora = [&](const layers::LoraRows& rows) {
      return rows.empty() ? layers::LoraSite() : layers::LoraSite(rows, i, *a.lora);
    };
    run_attention(layer, i, inputs, normed, attention, lora(adapted_rows_));
    if (last) {
      // Nothing after the last attention mixes tokens: go on with the rows to sample alone.
      if (rows == 0) return;
      const MatrixView own = layer.attention_columns().own(attention);
      attention = a.sampled_attention.rows_of(0, rows);
      copy_rows(own, inputs.sample_rows, layer.attention_columns().own(attention));
      copy_rows(residual, inputs.sample_rows, a.sampled_residual);
      residual = a.sampled_residual.rows_of(0, rows);
      normed = a.normed.rows_of(0, rows);
      delta = a.delta.rows_of(0, rows);
      mlp = rows_or_none(a.mlp, rows);
    }
    layer.attention_columns().all_gather(group_, attention);
    const layers::LoraSite site = lora(last ? adapted_samples_ : adapted_rows_);
    layer.output.forward(ctx_, group_, attention, delta, site, &layers::LoraLayer::o);
    ops::add_rms_norm(ctx_, residual, delta, layer.mlp_norm.weight, eps, normed,
                      layer.mlp_norm.bias);
    run_mlp(layer, normed, mlp, delta, site);
    const DecoderLayers::Norm& next =
        last ? layers_->final_norm : layers_->layers[i + 1].attention_norm;
    ops::add_rms_norm(ctx_, residual, delta, next.weight, eps, normed, next.bias);
  }
}

void DecoderModel::run_head(int64_t rows, float* logits) {
  const bool first = group_.rank() == 0;
  PHALANX_CHECK(!first || logits != nullptr);
  const int64_t vocab = config_.info.vocab_size;
  const MatrixView target =
      first ? MatrixView{.data = logits, .dtype = tensor::DType::kF32, .rows = rows, .cols = vocab,
                         .stride = vocab}
            : activations_->own_logits.rows_of(0, rows);
  layers_->vocab.head(ctx_, group_, activations_->normed.rows_of(0, rows), target);
}

}  // namespace phalanx::models
