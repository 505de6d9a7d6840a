#include "apps/make_random_model.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "phalanx/base/clock.h"
#include "phalanx/base/error.h"
#include "phalanx/base/json.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/tensor/dtype.h"

namespace phalanx::apps {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

struct Shape {
  int64_t hidden = 2048;
  int64_t layers = 16;
  int64_t heads = 32;
  int64_t kv_heads = 8;
  int64_t head_dim = 0;  // 0: hidden / heads
  int64_t intermediate = 8192;
  int64_t vocab = 49152;
  int64_t positions = 131072;
  bool untied = false;
  std::string family = "llama";
  int64_t experts = 8;            // mixtral, deepseek_v3
  int64_t experts_per_token = 2;
  int64_t expert_intermediate = 0;  // 0: intermediate
  std::string dtype = "bfloat16";
  uint64_t seed = 1;
};

// DeepSeek V3's ranks and head widths.
constexpr int64_t kQRank = 1536;
constexpr int64_t kKvRank = 512;
constexpr int64_t kNope = 128;  // also of values
constexpr int64_t kRope = 64;

// What config.json of a family says beyond LLaMA's keys.
json family_keys(const Shape& s) {
  if (s.family == "mixtral")
    return {{"model_type", "mixtral"},
            {"architectures", {"MixtralForCausalLM"}},
            {"intermediate_size", s.expert_intermediate},
            {"num_local_experts", s.experts},
            {"num_experts_per_tok", s.experts_per_token}};
  if (s.family == "deepseek_v3")
    return {{"model_type", "deepseek_v3"},
            {"architectures", {"DeepseekV3ForCausalLM"}},
            {"num_key_value_heads", s.heads},
            {"head_dim", kRope},
            {"q_lora_rank", kQRank},
            {"kv_lora_rank", kKvRank},
            {"qk_nope_head_dim", kNope},
            {"qk_rope_head_dim", kRope},
            {"v_head_dim", kNope},
            {"n_routed_experts", s.experts},
            {"num_experts_per_tok", s.experts_per_token},
            {"moe_intermediate_size", s.expert_intermediate},
            {"n_shared_experts", 1},
            {"n_group", 1},
            {"topk_group", 1},
            {"first_k_dense_replace", 1},
            {"norm_topk_prob", true},
            {"routed_scaling_factor", 2.5}};
  return json::object();
}

struct RandomTensor {
  std::string name;
  std::vector<int64_t> shape;
  double scale = 0;  // standard deviation; 0: all ones
  int64_t count = 0;
  int64_t offset = 0;  // in the data
};

// Scales at which activations keep their size through the layers and logits spread by about 3.
std::vector<RandomTensor> tensors_of(const Shape& s) {
  std::vector<RandomTensor> tensors;
  const auto add = [&](std::string name, std::vector<int64_t> shape, double scale) {
    tensors.push_back({.name = std::move(name), .shape = std::move(shape), .scale = scale});
  };
  const auto linear = [&](const std::string& name, int64_t rows, int64_t k) {
    add(name + ".weight", {rows, k}, 1.0 / std::sqrt(static_cast<double>(k)));
  };
  const double head_scale = 3.0 / std::sqrt(static_cast<double>(s.hidden));
  add("model.embed_tokens.weight", {s.vocab, s.hidden}, s.untied ? 1.0 : head_scale);
  const auto mlp = [&](const std::string& name, int64_t intermediate, const char* gate,
                       const char* up, const char* down) {
    linear(name + gate, intermediate, s.hidden);
    linear(name + up, intermediate, s.hidden);
    linear(name + down, s.hidden, intermediate);
  };
  for (int64_t i = 0; i < s.layers; ++i) {
    const std::string layer = fmt::format("model.layers.{}.", i);
    add(layer + "input_layernorm.weight", {s.hidden}, 0);
    if (s.family == "deepseek_v3") {
      const std::string attention = layer + "self_attn.";
      linear(attention + "q_a_proj", kQRank, s.hidden);
      add(attention + "q_a_layernorm.weight", {kQRank}, 0);
      linear(attention + "q_b_proj", s.heads * (kNope + kRope), kQRank);
      linear(attention + "kv_a_proj_with_mqa", kKvRank + kRope, s.hidden);
      add(attention + "kv_a_layernorm.weight", {kKvRank}, 0);
      linear(attention + "kv_b_proj", s.heads * (kNope + kNope), kKvRank);
      linear(attention + "o_proj", s.hidden, s.heads * kNope);
      add(layer + "post_attention_layernorm.weight", {s.hidden}, 0);
      if (i == 0) {
        mlp(layer + "mlp.", s.intermediate, "gate_proj", "up_proj", "down_proj");
        continue;
      }
      linear(layer + "mlp.gate", s.experts, s.hidden);
      add(layer + "mlp.gate.e_score_correction_bias", {s.experts}, 0.1);
      for (int64_t e = 0; e < s.experts; ++e)
        mlp(fmt::format("{}mlp.experts.{}.", layer, e), s.expert_intermediate, "gate_proj",
            "up_proj", "down_proj");
      mlp(layer + "mlp.shared_experts.", s.expert_intermediate, "gate_proj", "up_proj",
          "down_proj");
      continue;
    }
    linear(layer + "self_attn.q_proj", s.heads * s.head_dim, s.hidden);
    linear(layer + "self_attn.k_proj", s.kv_heads * s.head_dim, s.hidden);
    linear(layer + "self_attn.v_proj", s.kv_heads * s.head_dim, s.hidden);
    linear(layer + "self_attn.o_proj", s.hidden, s.heads * s.head_dim);
    add(layer + "post_attention_layernorm.weight", {s.hidden}, 0);
    if (s.family == "mixtral") {
      linear(layer + "block_sparse_moe.gate", s.experts, s.hidden);
      for (int64_t e = 0; e < s.experts; ++e)
        mlp(fmt::format("{}block_sparse_moe.experts.{}.", layer, e), s.expert_intermediate, "w1",
            "w3", "w2");
      continue;
    }
    mlp(layer + "mlp.", s.intermediate, "gate_proj", "up_proj", "down_proj");
  }
  add("model.norm.weight", {s.hidden}, 0);
  if (s.untied) add("lm_head.weight", {s.vocab, s.hidden}, head_scale);
  return tensors;
}

// SplitMix64 (https://prng.di.unimi.it/splitmix64.c) of a counter: any element at once.
uint64_t random_bits(uint64_t counter) {
  uint64_t z = counter * 0x9e3779b97f4a7c15ULL;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

// Elements [begin, begin + count) of a tensor whose first element has number `first` of the model;
// begin and count in fours but for the end. Uniform, of the wanted standard deviation.
template <typename T, typename Convert>
void fill(const RandomTensor& tensor, uint64_t first, int64_t begin, int64_t count, T* out,
          Convert convert) {
  if (tensor.scale == 0) {
    std::fill(out, out + count, convert(1.0F));
    return;
  }
  const auto step = static_cast<float>(tensor.scale * std::sqrt(12.0) / 65536.0);
  for (int64_t i = 0; i < count; i += 4) {
    const uint64_t bits = random_bits(first + static_cast<uint64_t>(begin + i));
    for (int64_t j = 0; j < std::min<int64_t>(4, count - i); ++j)
      out[i + j] =
          convert((static_cast<float>(bits >> (16 * j) & 0xffff) - 32767.5F) * step);
  }
}

void write_at(int fd, const std::string& path, const char* data, int64_t bytes, int64_t offset) {
  while (bytes > 0) {
    const ssize_t n = ::pwrite(fd, data, static_cast<size_t>(bytes), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0)
      throw Error(Code::kResourceExhausted,
                  fmt::format("cannot write {} bytes to {}: {}", bytes, path, std::strerror(errno)));
    data += n;
    offset += n;
    bytes -= n;
  }
}

void write_weights(const Shape& shape, const std::string& path) {
  std::vector<RandomTensor> tensors = tensors_of(shape);
  const bool wide = shape.dtype == "float32";
  const int64_t element = wide ? 4 : 2;
  json header = {{"__metadata__", {{"format", "pt"}}}};
  int64_t data_bytes = 0;
  for (RandomTensor& tensor : tensors) {
    tensor.count = 1;
    for (const int64_t n : tensor.shape) tensor.count *= n;
    tensor.offset = data_bytes;
    data_bytes += tensor.count * element;
    header[tensor.name] = {{"dtype", wide ? "F32" : shape.dtype == "float16" ? "F16" : "BF16"},
                           {"shape", tensor.shape},
                           {"data_offsets", {tensor.offset, data_bytes}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::string head(8, '\0');
  for (size_t i = 0; i < 8; ++i)
    head[i] = static_cast<char>(static_cast<uint64_t>(text.size()) >> (8 * i));
  head += text;

  UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (!fd.valid())
    throw Error(Code::kNotFound, fmt::format("cannot create {}: {}", path, std::strerror(errno)));
  write_at(fd.get(), path, head.data(), static_cast<int64_t>(head.size()), 0);

  struct Piece {
    const RandomTensor* tensor;
    uint64_t first;
    int64_t begin;
  };
  constexpr int64_t kPiece = 2 << 20;  // elements
  std::vector<Piece> pieces;
  uint64_t first = shape.seed << 40;
  for (const RandomTensor& tensor : tensors) {
    for (int64_t begin = 0; begin < tensor.count; begin += kPiece)
      pieces.push_back({&tensor, first, begin});
    first += static_cast<uint64_t>(tensor.count);
  }
  std::atomic<size_t> next{0};
  const auto work = [&] {
    std::vector<char> buffer(static_cast<size_t>(kPiece * element));
    for (size_t i = next.fetch_add(1); i < pieces.size(); i = next.fetch_add(1)) {
      const Piece& p = pieces[i];
      const int64_t count = std::min(kPiece, p.tensor->count - p.begin);
      if (wide)
        fill(*p.tensor, p.first, p.begin, count, reinterpret_cast<float*>(buffer.data()),
             [](float v) { return v; });
      else if (shape.dtype == "float16")
        fill(*p.tensor, p.first, p.begin, count, reinterpret_cast<uint16_t*>(buffer.data()),
             tensor::f32_to_f16);
      else
        fill(*p.tensor, p.first, p.begin, count, reinterpret_cast<uint16_t*>(buffer.data()),
             tensor::f32_to_bf16);
      write_at(fd.get(), path, buffer.data(), count * element,
               static_cast<int64_t>(head.size()) + p.tensor->offset + p.begin * element);
    }
  };
  const unsigned threads = std::max(1U, std::thread::hardware_concurrency());
  std::vector<std::exception_ptr> errors(threads);
  std::vector<std::thread> workers;
  for (unsigned t = 0; t < threads; ++t)
    workers.emplace_back([&, t] {
      try {
        work();
      } catch (...) {
        errors[t] = std::current_exception();
      }
    });
  for (std::thread& worker : workers) worker.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

// Copies what belongs to the tokenizer and returns the token ids its config.json names.
json copy_tokenizer(const std::string& from, const std::string& to) {
  if (!fs::exists(from + "/tokenizer.json"))
    throw Error(Code::kNotFound,
                fmt::format("{}: found no tokenizer.json, expected the directory of a checkpoint "
                            "with a tokenizer",
                            from));
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                           "chat_template.jinja", "vocab.json", "merges.txt"})
    if (fs::exists(from + "/" + name))
      fs::copy_file(from + "/" + name, to + "/" + name, fs::copy_options::overwrite_existing);
  json ids = json::object();
  const json config = read_json_file(from + "/config.json");
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"})
    if (config.contains(key)) ids[key] = config[key];
  return ids;
}

}  // namespace

int make_random_model(int argc, char** argv) {
  Shape shape;
  std::string directory;
  std::string tokenizer;
  CLI::App app("Writes a LLaMA checkpoint with random weights, for benches", "make-random-model");
  app.add_option("directory", directory, "where to write; created if absent")->required();
  app.add_option("--hidden", shape.hidden)->check(CLI::Range(int64_t{1}, int64_t{1} << 24))->capture_default_str();
  app.add_option("--layers", shape.layers)->check(CLI::Range(int64_t{1}, int64_t{1} << 24))->capture_default_str();
  app.add_option("--heads", shape.heads)->check(CLI::Range(int64_t{1}, int64_t{1} << 24))->capture_default_str();
  app.add_option("--kv-heads", shape.kv_heads)->check(CLI::Range(int64_t{1}, int64_t{1} << 24))->capture_default_str();
  app.add_option("--head-dim", shape.head_dim, "hidden / heads unless given")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
  app.add_option("--intermediate", shape.intermediate)
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
      ->capture_default_str();
  app.add_option("--vocab", shape.vocab)->check(CLI::Range(int64_t{1}, int64_t{1} << 24))->capture_default_str();
  app.add_option("--positions", shape.positions)->check(CLI::Range(int64_t{1}, int64_t{1} << 24))->capture_default_str();
  app.add_flag("--untied", shape.untied, "a head of its own");
  app.add_option("--family", shape.family, "with experts: mixtral, deepseek_v3")
      ->check(CLI::IsMember({"llama", "mixtral", "deepseek_v3"}))
      ->capture_default_str();
  app.add_option("--experts", shape.experts, "of mixtral and deepseek_v3")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--experts-per-token", shape.experts_per_token)
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--expert-intermediate", shape.expert_intermediate,
                 "of each expert; --intermediate unless given")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
  app.add_option("--dtype", shape.dtype)
      ->check(CLI::IsMember({"bfloat16", "float16", "float32"}))
      ->capture_default_str();
  app.add_option("--seed", shape.seed)->check(CLI::Range(1, 1 << 20))->capture_default_str();
  app.add_option("--tokenizer-from", tokenizer, "checkpoint directory whose tokenizer is copied");
  CLI11_PARSE(app, argc, argv);
  try {
    if (shape.head_dim == 0) shape.head_dim = shape.hidden / shape.heads;
    if (shape.expert_intermediate == 0) shape.expert_intermediate = shape.intermediate;
    const int64_t begin_ns = now_ns();
    fs::create_directories(directory);
    json config = {{"model_type", "llama"},
                   {"architectures", {"LlamaForCausalLM"}},
                   {"hidden_size", shape.hidden},
                   {"num_hidden_layers", shape.layers},
                   {"num_attention_heads", shape.heads},
                   {"num_key_value_heads", shape.kv_heads},
                   {"head_dim", shape.head_dim},
                   {"intermediate_size", shape.intermediate},
                   {"vocab_size", shape.vocab},
                   {"max_position_embeddings", shape.positions},
                   {"rms_norm_eps", 1e-5},
                   {"rope_theta", 500000.0},
                   {"hidden_act", "silu"},
                   {"attention_bias", false},
                   {"mlp_bias", false},
                   {"tie_word_embeddings", !shape.untied},
                   {"torch_dtype", shape.dtype}};
    config.update(family_keys(shape));
    if (!tokenizer.empty()) config.update(copy_tokenizer(tokenizer, directory));
    write_weights(shape, directory + "/model.safetensors");
    // Last, so that a directory with a config.json is whole.
    std::ofstream out(directory + "/config.json");
    out << config.dump(1) << "\n";
    out.close();
    if (!out)
      throw Error(Code::kResourceExhausted, fmt::format("cannot write {}/config.json", directory));
    fmt::print(stderr, "{}: {:.2f} GB in {:.1f} s\n", directory,
               static_cast<double>(fs::file_size(directory + "/model.safetensors")) * 1e-9,
               static_cast<double>(now_ns() - begin_ns) * 1e-9);
    return 0;
  } catch (const std::exception& e) {
    fmt::print(stderr, "make-random-model: {}\n", e.what());
    return 1;
  }
}

}  // namespace phalanx::apps
