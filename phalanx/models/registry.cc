#include "phalanx/models/registry.h"

#include <fmt/format.h>

#include <array>

#include "phalanx/layers/weight_plan.h"
#include "phalanx/models/decoder_model.h"
#include "phalanx/models/expert_names.h"
#include "phalanx/weights/checkpoint.h"
#include "phalanx/weights/quant_formats.h"

namespace phalanx::models {
namespace {

constexpr std::array<std::string_view, 1> kRotaryTables = {".rotary_emb.inv_freq"};
// Layers that predict several tokens at once, in ERNIE's names.
constexpr std::array<std::string_view, 2> kMultiToken = {".rotary_emb.inv_freq", ".mtp_"};

constexpr Family kFamilies[] = {
    {"llama", read_llama, kRotaryTables},
    {"mistral", read_mistral, kRotaryTables},
    {"qwen2", read_qwen2, kRotaryTables},
    {"qwen3", read_qwen3, kRotaryTables},
    {"ernie4_5", read_ernie4_5, kMultiToken},
    {"mixtral", read_mixtral, kRotaryTables},
    {"deepseek", read_deepseek, kRotaryTables},
    {"deepseek_v2", read_deepseek_v2, kRotaryTables},
    {"deepseekv2", read_deepseek_v2, kRotaryTables},
    {"deepseek_v3", read_deepseek_v3, kRotaryTables},
    {"kimi_k2", read_deepseek_v3, kRotaryTables},
    {"qwen2_moe", read_qwen2_moe, kRotaryTables},
    {"qwen3_moe", read_qwen3_moe, kRotaryTables},
    {"glm4_moe", read_glm4_moe, kRotaryTables},
    {"ernie4_5_moe", read_ernie4_5_moe, kMultiToken},
};

// What no machine holds is a mistake in config.json; found before sizes are multiplied.
void refuse_giants(const ConfigReader& reader, const ModelInfo& info) {
  constexpr double kMostBytes = 1e15;
  constexpr int64_t kMostExperts = 1 << 17;
  const auto wide = [](int64_t n) { return static_cast<double>(n); };
  const Experts& experts = info.experts;
  const double heads = wide(info.num_attention_heads) *
                       (wide(info.head_dim) + wide(info.latent.qk_nope_head_dim) +
                        wide(info.latent.qk_rope_head_dim) + wide(info.latent.v_head_dim));
  const double attention = heads * (4 * wide(info.hidden_size) + wide(info.latent.q_lora_rank) +
                                    wide(info.latent.kv_lora_rank)) +
                           wide(info.hidden_size) * wide(info.latent.q_lora_rank);
  const double mlp = 3 * wide(info.hidden_size) *
                     (wide(info.intermediate_size) + wide(experts.shared_intermediate_size) +
                      wide(experts.count) * wide(experts.intermediate_size));
  const double bytes = 4 * (wide(info.num_layers) * (attention + mlp) +
                            2 * wide(info.vocab_size) * wide(info.hidden_size));
  if (bytes > kMostBytes)
    reader.refuse("num_hidden_layers", "a model of sizes that cannot be",
                  fmt::format("sizes of fewer than {:.0e} bytes together, not {:.1e}", kMostBytes,
                              bytes));
  if (info.num_layers * experts.count > kMostExperts)
    reader.refuse("num_hidden_layers", "more experts than can be",
                  fmt::format("at most {} over all layers, not {}", kMostExperts,
                              info.num_layers * experts.count));
}

}  // namespace

std::span<const Family> families() { return kFamilies; }

const Family& family_of(const ConfigReader& config) {
  const std::string model_type = config.text("model_type", "");
  std::string known;
  for (const Family& family : kFamilies) {
    if (family.model_type == model_type) return family;
    known += (known.empty() ? "" : ", ") + std::string(family.model_type);
  }
  throw Error(Code::kInvalidArgument,
              to_string(Problem{.what = model_type.empty() ? "key missing" : "unknown model family",
                                .where = config.path() + ": model_type",
                                .found = model_type,
                                .expected = "one of " + known,
                                .fix = "use a checkpoint of one of these families"}));
}

FamilyConfig read_config(const std::string& directory) {
  Problems problems;
  const ConfigReader reader(directory + "/config.json", problems);
  const Family& family = family_of(reader);
  DecoderConfig config = family.read(reader);
  config.info.formats = weights::read_quant_formats(directory, problems);
  if (config.info.formats != nullptr && config.info.formats->kv_int8 &&
      config.info.latent.kv_lora_rank > 0)
    problems.add({.what = "quantised KV cache (C8) of compressed keys and values has no kernels",
                  .where = directory,
                  .found = std::string(family.model_type),
                  .expected = "C8 with heads of keys and values of their own",
                  .fix = "use another checkpoint, or one without kv_cache_type"});
  refuse_giants(reader, config.info);
  problems.throw_if_any(fmt::format("model {} cannot be used", directory));
  config.info.model_type = family.model_type;
  config.info.parameter_bytes = parameter_bytes(config.info);
  return {&family, config};
}

ModelInfo read_model_info(const std::string& directory) {
  return read_config(directory).config.info;
}

void check_checkpoint(const std::string& directory) {
  const FamilyConfig found = read_config(directory);
  Problems problems;
  weights::Checkpoint checkpoint(directory, problems);
  if (problems.empty()) name_experts(found.config.info, checkpoint, problems);
  if (problems.empty()) verify_checkpoint(found.config.info, checkpoint, problems);
  problems.throw_if_any(fmt::format("checkpoint {} cannot be used", directory));
}

std::unique_ptr<Model> load_model(const ModelOptions& options, comm::Group& group, ThreadPool& pool,
                                  const std::function<void(int64_t, int64_t)>& progress) {
  const FamilyConfig found = read_config(options.directory);
  return std::make_unique<DecoderModel>(found.config, found.family->known_extras, options, group,
                                        pool, progress);
}

}  // namespace phalanx::models
