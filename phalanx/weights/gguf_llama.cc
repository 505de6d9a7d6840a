#include "phalanx/weights/gguf_llama.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <numbers>
#include <set>

#include "phalanx/tensor/dtype.h"

namespace phalanx::weights {
namespace {

using nlohmann::ordered_json;
using tensor::DType;

constexpr int64_t kPieceElements = 4 << 20;  // 16 MB as f32
constexpr int64_t kMaxDimension = 1 << 24;

// The shortest decimal that is this float: 1e-05 and not 9.999999747378752e-06.
double shortest(float value) { return std::stod(fmt::format("{}", value)); }

// Factors by which Llama 3.1 divides the frequencies (transformers, _compute_llama3_parameters).
std::vector<float> llama3_factors(int64_t head_dim, double theta, double factor, double low,
                                  double high, double original_context) {
  std::vector<float> factors;
  for (int64_t i = 0; i < head_dim; i += 2) {
    const double wavelength =
        2 * std::numbers::pi *
        std::pow(theta, static_cast<double>(i) / static_cast<double>(head_dim));
    if (wavelength < original_context / high) {
      factors.push_back(1);
    } else if (wavelength > original_context / low) {
      factors.push_back(static_cast<float>(factor));
    } else {
      const double smooth = (original_context / wavelength - low) / (high - low);
      factors.push_back(static_cast<float>(1 / ((1 - smooth) / factor + smooth)));
    }
  }
  return factors;
}

}  // namespace

GgufLlama::GgufLlama(const GgufFile& file, DType dtype) : file_(file), dtype_(dtype) {
  architecture_ = file_.text("general.architecture");
  if (architecture_ != "llama" && architecture_ != "qwen2" && architecture_ != "qwen3")
    fail(fmt::format(
             "general.architecture: found \"{}\", expected \"llama\", \"qwen2\" or \"qwen3\"",
             architecture_),
         Code::kUnimplemented);
  read_configuration();
  read_rope_scaling();
  map_tensors();
}

void GgufLlama::fail(const std::string& what, Code code) const {
  throw Error(code, fmt::format("{}: {}", file_.path(), what));
}

int64_t GgufLlama::positive(const std::string& name) const {
  const int64_t value = file_.integer(key(name));
  if (value < 1 || value > kMaxDimension)
    fail(fmt::format("{}: found {}, expected 1 to {}", key(name), value, kMaxDimension));
  return value;
}

int64_t GgufLlama::positive(const std::string& name, int64_t otherwise) const {
  return file_.has(key(name)) ? positive(name) : otherwise;
}

void GgufLlama::read_configuration() {
  if (file_.integer(key("expert_count"), 0) != 0) {
    if (architecture_ != "llama")
      fail(fmt::format("{}: found {}; of models with experts only those of the architecture llama "
                       "(Mixtral) can be imported",
                       key("expert_count"), file_.integer(key("expert_count"))),
           Code::kUnimplemented);
    experts_ = positive("expert_count");
    experts_used_ = positive("expert_used_count");
    if (experts_used_ > experts_)
      fail(fmt::format("{}: found {}, expected at most {} = {}", key("expert_used_count"),
                       experts_used_, key("expert_count"), experts_));
  }
  layers_ = positive("block_count");
  hidden_ = positive("embedding_length");
  intermediate_ = positive("feed_forward_length");
  heads_ = positive("attention.head_count");
  kv_heads_ = positive("attention.head_count_kv", heads_);
  context_length_ = positive("context_length");
  head_dim_ = positive("attention.key_length", hidden_ / heads_);
  if (heads_ % kv_heads_ != 0)
    fail(fmt::format("{} query heads are no multiple of {} key/value heads", heads_, kv_heads_));
  if (!file_.has(key("attention.key_length")) && hidden_ % heads_ != 0)
    fail(fmt::format("{} = {} is no multiple of {} = {}", key("embedding_length"), hidden_,
                     key("attention.head_count"), heads_));
  if (head_dim_ % 2 != 0) fail(fmt::format("head size {} is odd", head_dim_));
  if (positive("attention.value_length", head_dim_) != head_dim_)
    fail(fmt::format("{}: found {}, expected {} as keys", key("attention.value_length"),
                     positive("attention.value_length"), head_dim_),
         Code::kUnimplemented);
  if (positive("rope.dimension_count", head_dim_) != head_dim_)
    fail(fmt::format(
             "{}: found {}, expected {} (the head size); partial rotation cannot be imported",
             key("rope.dimension_count"), positive("rope.dimension_count"), head_dim_),
         Code::kUnimplemented);
  rms_norm_eps_ = static_cast<float>(file_.number(key("attention.layer_norm_rms_epsilon")));
  rope_theta_ = static_cast<float>(file_.number(key("rope.freq_base"), 10000.0));
  if (!(rms_norm_eps_ > 0 && rms_norm_eps_ < 1) || !(rope_theta_ >= 1) ||
      !std::isfinite(rope_theta_))
    fail(fmt::format("{} = {} or {} = {} cannot be", key("attention.layer_norm_rms_epsilon"),
                     rms_norm_eps_, key("rope.freq_base"), rope_theta_));
}

void GgufLlama::read_rope_scaling() {
  rope_scaling_ = "null";
  const std::string type = file_.text(key("rope.scaling.type"), "none");
  // Old files have only the factor, under another name.
  const double factor =
      file_.number(key("rope.scaling.factor"), file_.number(key("rope.scale_linear"), 1.0));
  if (const GgufTensor* factors = file_.find_tensor("rope_freqs.weight")) {
    read_rope_factors(*factors);
    return;
  }
  if (type == "none" || factor == 1.0) return;
  if (type == "yarn") {
    rope_scaling_ =
        ordered_json{{"rope_type", "yarn"},
                     {"factor", factor},
                     {"original_max_position_embeddings",
                      positive("rope.scaling.original_context_length")}}
            .dump();
    return;
  }
  if (type != "linear")
    fail(fmt::format("{}: found \"{}\", expected \"none\", \"linear\" or \"yarn\"",
                     key("rope.scaling.type"), type),
         Code::kUnimplemented);
  rope_scaling_ = ordered_json{{"rope_type", "linear"}, {"factor", factor}}.dump();
}

// The file holds the factors, config.json the parameters they came from. All Llama 3 models share
// three of the four.
void GgufLlama::read_rope_factors(const GgufTensor& factors) {
  if (factors.shape != std::vector<int64_t>{head_dim_ / 2})
    fail(fmt::format("tensor rope_freqs.weight: found {} values, expected {} (half a head)",
                     factors.rows() * factors.row_elements(), head_dim_ / 2));
  std::vector<float> found(static_cast<size_t>(head_dim_ / 2));
  file_.read_rows(factors, 0, found);
  constexpr double kLow = 1, kHigh = 4, kOriginalContext = 8192;
  const float factor = *std::max_element(found.begin(), found.end());
  const auto expected =
      llama3_factors(head_dim_, rope_theta_, factor, kLow, kHigh, kOriginalContext);
  for (size_t i = 0; i < found.size(); ++i)
    if (!(std::abs(found[i] - expected[i]) <= 1e-3F * expected[i]))
      fail(fmt::format("tensor rope_freqs.weight: value {} is {}, expected {} as in Llama 3.1 with "
                       "factor {}; "
                       "other scaling cannot be imported",
                       i, found[i], expected[i], factor),
           Code::kUnimplemented);
  rope_scaling_ =
      ordered_json{{"rope_type", "llama3"},
                   {"factor", shortest(factor)},
                   {"low_freq_factor", kLow},
                   {"high_freq_factor", kHigh},
                   {"original_max_position_embeddings", static_cast<int64_t>(kOriginalContext)}}
          .dump();
}

void GgufLlama::add(std::set<std::string>& taken, const std::string& name,
                    const std::string& gguf_name, std::vector<int64_t> shape, int64_t heads) {
  const GgufTensor* tensor = file_.find_tensor(gguf_name);
  if (tensor == nullptr) fail(fmt::format("tensor {} is missing", gguf_name));
  if (tensor->shape != shape)
    fail(fmt::format("tensor {}: found shape [{}], expected [{}] from the metadata", gguf_name,
                     fmt::join(tensor->shape, ", "), fmt::join(shape, ", ")));
  taken.insert(gguf_name);
  sources_.push_back({{name, dtype_, std::move(shape)}, tensor, heads});
}

// The experts lie in one tensor of each kind, or, in old files, in one per expert.
void GgufLlama::map_experts(const std::string& to, const std::string& from,
                            std::set<std::string>& taken) {
  add(taken, to + "gate.weight", from + "ffn_gate_inp.weight", {experts_, hidden_});
  struct Kind {
    const char* name;
    const char* gguf_name;
    int64_t rows;
    int64_t cols;
  };
  for (const Kind& kind : {Kind{"w1", "ffn_gate", intermediate_, hidden_},
                           Kind{"w2", "ffn_down", hidden_, intermediate_},
                           Kind{"w3", "ffn_up", intermediate_, hidden_}}) {
    const std::string all = fmt::format("{}{}_exps.weight", from, kind.gguf_name);
    const bool stacked = file_.find_tensor(all) != nullptr;
    if (stacked) {
      add(taken, "", all, {experts_, kind.rows, kind.cols});
      sources_.pop_back();
    }
    for (int64_t e = 0; e < experts_; ++e) {
      const std::string name = fmt::format("{}experts.{}.{}.weight", to, e, kind.name);
      if (stacked)
        sources_.push_back({{name, dtype_, {kind.rows, kind.cols}}, file_.find_tensor(all), 0,
                            e * kind.rows});
      else
        add(taken, name, fmt::format("{}{}.{}.weight", from, kind.gguf_name, e),
            {kind.rows, kind.cols});
    }
  }
}

void GgufLlama::map_tensors() {
  std::set<std::string> taken{"rope_freqs.weight"};
  const auto add = [&](const std::string& name, const std::string& gguf_name,
                       std::vector<int64_t> shape, int64_t heads = 0) {
    this->add(taken, name, gguf_name, std::move(shape), heads);
  };
  const GgufTensor* embedding = file_.find_tensor("token_embd.weight");
  if (embedding == nullptr) fail("tensor token_embd.weight is missing");
  vocab_ = embedding->shape.front();
  tied_ = file_.find_tensor("output.weight") == nullptr;
  bias_ = file_.find_tensor("blk.0.attn_q.bias") != nullptr;
  output_bias_ = file_.find_tensor("blk.0.attn_output.bias") != nullptr;
  if ((architecture_ == "llama" || architecture_ == "qwen3") && bias_ != output_bias_)
    fail(
        "biases of q, k and v without one of the output projection (or the reverse) cannot be "
        "expressed",
        Code::kUnimplemented);

  if (experts_ > 0 && bias_)
    fail("biases of a model with experts cannot be expressed", Code::kUnimplemented);
  const bool permuted = architecture_ == "llama";
  const int64_t query = heads_ * head_dim_;
  const int64_t kv = kv_heads_ * head_dim_;
  add("model.embed_tokens.weight", "token_embd.weight", {vocab_, hidden_});
  for (int64_t i = 0; i < layers_; ++i) {
    const std::string to = fmt::format("model.layers.{}.", i);
    const std::string from = fmt::format("blk.{}.", i);
    add(to + "input_layernorm.weight", from + "attn_norm.weight", {hidden_});
    add(to + "self_attn.q_proj.weight", from + "attn_q.weight", {query, hidden_},
        permuted ? heads_ : 0);
    add(to + "self_attn.k_proj.weight", from + "attn_k.weight", {kv, hidden_},
        permuted ? kv_heads_ : 0);
    add(to + "self_attn.v_proj.weight", from + "attn_v.weight", {kv, hidden_});
    add(to + "self_attn.o_proj.weight", from + "attn_output.weight", {hidden_, query});
    if (bias_) {
      add(to + "self_attn.q_proj.bias", from + "attn_q.bias", {query}, permuted ? heads_ : 0);
      add(to + "self_attn.k_proj.bias", from + "attn_k.bias", {kv}, permuted ? kv_heads_ : 0);
      add(to + "self_attn.v_proj.bias", from + "attn_v.bias", {kv});
    }
    if (output_bias_) add(to + "self_attn.o_proj.bias", from + "attn_output.bias", {hidden_});
    add(to + "post_attention_layernorm.weight", from + "ffn_norm.weight", {hidden_});
    if (architecture_ == "qwen3") {
      add(to + "self_attn.q_norm.weight", from + "attn_q_norm.weight", {head_dim_});
      add(to + "self_attn.k_norm.weight", from + "attn_k_norm.weight", {head_dim_});
    }
    if (experts_ > 0) {
      map_experts(to + "block_sparse_moe.", from, taken);
      continue;
    }
    add(to + "mlp.gate_proj.weight", from + "ffn_gate.weight", {intermediate_, hidden_});
    add(to + "mlp.up_proj.weight", from + "ffn_up.weight", {intermediate_, hidden_});
    add(to + "mlp.down_proj.weight", from + "ffn_down.weight", {hidden_, intermediate_});
  }
  add("model.norm.weight", "output_norm.weight", {hidden_});
  if (!tied_) add("lm_head.weight", "output.weight", {vocab_, hidden_});
  for (const GgufTensor& tensor : file_.tensors())
    if (!taken.contains(tensor.name))
      fail(fmt::format("tensor {} is not known in the architecture {}", tensor.name, architecture_),
           Code::kUnimplemented);
}

std::vector<int64_t> GgufLlama::end_ids() const {
  std::vector<int64_t> ids;
  for (const char* name : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}) {
    const int64_t id = file_.integer(name, -1);
    if (id >= 0 && std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
  return ids;
}

namespace {

// One id as a number, several as a list, none as null.
ordered_json ids_as_json(const std::vector<int64_t>& ids) {
  if (ids.empty()) return nullptr;
  if (ids.size() == 1) return ids[0];
  return ids;
}

void put_ids(ordered_json& out, const GgufFile& file, const std::vector<int64_t>& end_ids) {
  if (const int64_t bos = file.integer("tokenizer.ggml.bos_token_id", -1); bos >= 0)
    out["bos_token_id"] = bos;
  if (!end_ids.empty()) out["eos_token_id"] = ids_as_json(end_ids);
  if (const int64_t pad = file.integer("tokenizer.ggml.padding_token_id", -1); pad >= 0)
    out["pad_token_id"] = pad;
}

}  // namespace

std::string GgufLlama::config_json() const {
  const bool llama = architecture_ == "llama" && experts_ == 0;
  const std::string_view dtype = dtype_ == DType::kF32   ? "float32"
                                 : dtype_ == DType::kF16 ? "float16"
                                                         : "bfloat16";
  ordered_json out;
  out["architectures"] = {experts_ > 0               ? "MixtralForCausalLM"
                          : llama                    ? "LlamaForCausalLM"
                          : architecture_ == "qwen2" ? "Qwen2ForCausalLM"
                                                     : "Qwen3ForCausalLM"};
  out["model_type"] = experts_ > 0 ? "mixtral" : architecture_;
  if (llama) {
    out["attention_bias"] = bias_;
    out["mlp_bias"] = false;
    out["pretraining_tp"] = 1;
  } else if (experts_ > 0) {
    out["num_local_experts"] = experts_;
    out["num_experts_per_tok"] = experts_used_;
  } else {
    if (architecture_ == "qwen3") out["attention_bias"] = bias_;
    out["use_sliding_window"] = false;
  }
  out["attention_dropout"] = 0.0;
  put_ids(out, file_, end_ids());
  out["head_dim"] = head_dim_;
  out["hidden_act"] = "silu";
  out["hidden_size"] = hidden_;
  out["initializer_range"] = 0.02;
  out["intermediate_size"] = intermediate_;
  out["max_position_embeddings"] = context_length_;
  out["num_attention_heads"] = heads_;
  out["num_hidden_layers"] = layers_;
  out["num_key_value_heads"] = kv_heads_;
  out["rms_norm_eps"] = shortest(rms_norm_eps_);
  out["rope_scaling"] = ordered_json::parse(rope_scaling_);
  out["rope_theta"] = shortest(rope_theta_);
  out["tie_word_embeddings"] = tied_;
  out["torch_dtype"] = dtype;
  out["use_cache"] = true;
  out["vocab_size"] = vocab_;
  return out.dump(2) + "\n";
}

std::string GgufLlama::generation_config_json() const {
  ordered_json out = ordered_json::object();
  out["_from_model_config"] = true;
  put_ids(out, file_, end_ids());
  return out.dump(2) + "\n";
}

std::vector<NewTensor> GgufLlama::entries() const {
  std::vector<NewTensor> entries;
  for (const Source& source : sources_) entries.push_back(source.entry);
  return entries;
}

void GgufLlama::write_weights(const std::string& dir, int64_t max_shard_bytes,
                              const std::function<void(int64_t)>& advance) const {
  const auto shards = plan_shards(entries(), max_shard_bytes);
  size_t next = 0;
  for (const CheckpointShard& shard : shards) {
    SafetensorsWriter out(dir + "/" + shard.file_name, shard.entries);
    for (size_t i = 0; i < shard.entries.size(); ++i) write_tensor(sources_[next++], out, advance);
    out.finish();
  }
  if (shards.size() > 1) write_file(dir + "/model.safetensors.index.json", shard_index(shards));
}

void GgufLlama::write_tensor(const Source& source, SafetensorsWriter& out,
                             const std::function<void(int64_t)>& advance) const {
  // A vector is a matrix of one column where its values are permuted, of one row otherwise; GGUF
  // stores vectors of f32, so single values can be read.
  const GgufTensor& tensor = *source.tensor;
  const bool vector = tensor.shape.size() == 1;
  const int64_t row = vector ? 1 : tensor.row_elements();
  const int64_t rows = vector ? tensor.row_elements() : source.entry.shape.front();
  const int64_t half = source.heads > 0 ? rows / source.heads / 2 : 0;
  // A permuted tensor goes in whole heads.
  const int64_t unit = source.heads > 0 ? 2 * half : 1;
  const int64_t step = vector ? rows : std::max<int64_t>(unit, kPieceElements / row / unit * unit);
  std::vector<float> read(static_cast<size_t>(std::min(step, rows) * row));
  std::vector<float> ordered(source.heads > 0 ? read.size() : 0);
  std::vector<std::byte> stored;
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t count = std::min(step, rows - first);
    const std::span<float> values(read.data(), static_cast<size_t>(count * row));
    file_.read_rows(tensor, vector ? 0 : source.first + first, values);
    std::span<const float> result = values;
    if (source.heads > 0) {
      // Stored row 2 i + s of a head is Hugging Face's row s * half + i.
      for (int64_t r = 0; r < count; ++r) {
        const int64_t in_head = r % unit;
        const int64_t from = r - in_head + 2 * (in_head % half) + in_head / half;
        std::copy_n(values.data() + from * row, row, ordered.data() + r * row);
      }
      result = std::span<const float>(ordered.data(), values.size());
    }
    stored.resize(result.size() * tensor::dtype_bytes(dtype_));
    for (size_t i = 0; i < result.size(); ++i) {
      if (dtype_ == DType::kF32) {
        std::memcpy(stored.data() + 4 * i, &result[i], 4);
        continue;
      }
      const uint16_t value =
          dtype_ == DType::kF16 ? tensor::f32_to_f16(result[i]) : tensor::f32_to_bf16(result[i]);
      if (dtype_ == DType::kF16 && (value & 0x7c00) == 0x7c00 && std::isfinite(result[i]))
        fail(fmt::format("tensor {}: value {} is beyond f16. Fix: --dtype bf16 or f32", tensor.name,
                         result[i]));
      std::memcpy(stored.data() + 2 * i, &value, 2);
    }
    out.append(stored);
    advance(static_cast<int64_t>(stored.size()));
  }
}

}  // namespace phalanx::weights
