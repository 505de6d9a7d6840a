#include "phalanx/weights/gguf_llama.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "phalanx/base/error.h"
#include "phalanx/base/json.h"
#include "phalanx/weights/gguf_testing.h"

namespace phalanx::weights {
namespace {

constexpr int64_t kHidden = 8, kHeads = 2, kKvHeads = 1, kHeadDim = 4, kIntermediate = 6,
                  kVocab = 5;

// Values that say where they are: row r, column c of tensor t is t + r + c / 16.
std::vector<float> values(int64_t rows, int64_t columns, float tensor) {
  std::vector<float> out;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      out.push_back(tensor + static_cast<float>(r) + static_cast<float>(c) / 16);
  return out;
}

GgufBytes tiny(const std::string& architecture = "llama") {
  GgufBytes file;
  const std::string a = architecture + ".";
  file.text("general.architecture", architecture);
  file.u32(a + "block_count", 1);
  file.u32(a + "embedding_length", kHidden);
  file.u32(a + "feed_forward_length", kIntermediate);
  file.u32(a + "attention.head_count", kHeads);
  file.u32(a + "attention.head_count_kv", kKvHeads);
  file.u32(a + "context_length", 128);
  file.f32(a + "attention.layer_norm_rms_epsilon", 1e-5F);
  file.f32(a + "rope.freq_base", 500000);
  file.u32("tokenizer.ggml.bos_token_id", 1);
  file.u32("tokenizer.ggml.eos_token_id", 2);
  const auto matrix = [&](const std::string& name, int64_t rows, int64_t columns, float tensor) {
    file.tensor(name, {rows, columns}, values(rows, columns, tensor));
  };
  matrix("token_embd.weight", kVocab, kHidden, 0);
  file.tensor("blk.0.attn_norm.weight", {kHidden}, values(1, kHidden, 10));
  matrix("blk.0.attn_q.weight", kHeads * kHeadDim, kHidden, 20);
  matrix("blk.0.attn_k.weight", kKvHeads * kHeadDim, kHidden, 30);
  matrix("blk.0.attn_v.weight", kKvHeads * kHeadDim, kHidden, 40);
  matrix("blk.0.attn_output.weight", kHidden, kHeads * kHeadDim, 50);
  file.tensor("blk.0.ffn_norm.weight", {kHidden}, values(1, kHidden, 60));
  matrix("blk.0.ffn_gate.weight", kIntermediate, kHidden, 70);
  matrix("blk.0.ffn_up.weight", kIntermediate, kHidden, 80);
  matrix("blk.0.ffn_down.weight", kHidden, kIntermediate, 90);
  file.tensor("output_norm.weight", {kHidden}, values(1, kHidden, 100));
  return file;
}

class GgufLlamaTest : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = testing::TempDir() + "gguf_llama_test";
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directories(dir_);
  }
  GgufFile open(const GgufBytes& file) {
    const std::string path = dir_ + "/model.gguf";
    std::ofstream(path, std::ios::binary) << file.bytes();
    return GgufFile::open(path);
  }
  std::string error_of(const GgufBytes& bytes, Code code,
                       tensor::DType dtype = tensor::DType::kF32) {
    try {
      const GgufFile file = open(bytes);
      GgufLlama(file, dtype).write_weights(dir_, 1 << 30, [](int64_t) {});
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), code) << e.what();
      const std::string where = dir_ + "/model.gguf: ";
      EXPECT_EQ(std::string(e.what()).find(where), 0u);
      return std::string(e.what()).substr(where.size());
    }
    return "nothing was thrown";
  }
  nlohmann::json config(const GgufBytes& bytes) {
    const GgufFile file = open(bytes);
    return parse_json(GgufLlama(file, tensor::DType::kBF16).config_json(), "config");
  }
  // The tensors of a written f32 file.
  std::map<std::string, std::vector<float>> read_back(const std::string& name) {
    const std::string text = read_text_file(dir_ + "/" + name, 1 << 20);
    uint64_t length = 0;
    std::memcpy(&length, text.data(), sizeof(length));
    EXPECT_EQ((length + 8) % 64, 0u);
    const auto header = parse_json(std::string_view(text).substr(8, length), name);
    std::map<std::string, std::vector<float>> tensors;
    for (const auto& [key, value] : header.items()) {
      if (key == "__metadata__") continue;
      const size_t begin = value["data_offsets"][0];
      const size_t end = value["data_offsets"][1];
      std::vector<float> data((end - begin) / 4);
      std::memcpy(data.data(), text.data() + 8 + length + begin, end - begin);
      tensors[key] = data;
    }
    return tensors;
  }
  std::string dir_;
};

TEST_F(GgufLlamaTest, WritesHuggingFacesNamesAndOrder) {
  const GgufFile file = open(tiny());
  const GgufLlama model(file, tensor::DType::kF32);
  int64_t written = 0;
  model.write_weights(dir_, 1 << 30, [&](int64_t n) { written += n; });
  int64_t expected = 0;
  for (const auto& entry : model.entries()) expected += entry.bytes();
  EXPECT_EQ(written, expected);
  struct stat st {};
  ASSERT_EQ(::stat((dir_ + "/model.safetensors").c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777, 0640u);
  EXPECT_FALSE(std::filesystem::exists(dir_ + "/model.safetensors.part"));

  auto tensors = read_back("model.safetensors");
  EXPECT_EQ(tensors.size(), 11u);
  EXPECT_EQ(tensors["model.embed_tokens.weight"], values(kVocab, kHidden, 0));
  EXPECT_EQ(tensors["model.layers.0.input_layernorm.weight"], values(1, kHidden, 10));
  EXPECT_EQ(tensors["model.layers.0.self_attn.v_proj.weight"], values(kHeadDim, kHidden, 40));
  EXPECT_EQ(tensors["model.layers.0.self_attn.o_proj.weight"], values(kHidden, kHidden, 50));
  EXPECT_EQ(tensors["model.layers.0.post_attention_layernorm.weight"], values(1, kHidden, 60));
  EXPECT_EQ(tensors["model.layers.0.mlp.down_proj.weight"], values(kHidden, kIntermediate, 90));
  EXPECT_EQ(tensors["model.norm.weight"], values(1, kHidden, 100));
  // Stored rows 0 1 2 3 of a head are Hugging Face's rows 0 2 1 3 of it.
  const auto q = tensors["model.layers.0.self_attn.q_proj.weight"];
  for (const auto& [row, stored] :
       {std::pair{0, 0}, {1, 2}, {2, 1}, {3, 3}, {4, 4}, {5, 6}, {6, 5}, {7, 7}})
    EXPECT_EQ(q[static_cast<size_t>(row * kHidden)], 20.0F + static_cast<float>(stored)) << row;
  EXPECT_EQ(tensors["model.layers.0.self_attn.k_proj.weight"][kHidden], 32.0F);
}

TEST_F(GgufLlamaTest, ShardsAndIndex) {
  const GgufFile file = open(tiny());
  const GgufLlama model(file, tensor::DType::kF32);
  model.write_weights(dir_, 600, [](int64_t) {});
  const auto index = read_json_file(dir_ + "/model.safetensors.index.json");
  std::set<std::string> files;
  for (const auto& [name, shard] : index["weight_map"].items()) {
    files.insert(shard.get<std::string>());
    ASSERT_TRUE(read_back(shard).contains(name)) << name;
  }
  EXPECT_GT(files.size(), 2u);
  EXPECT_EQ(*files.begin(), fmt::format("model-00001-of-{:05}.safetensors", files.size()));
  EXPECT_EQ(index["weight_map"].size(), 11u);
  int64_t total = 0;
  for (const auto& entry : model.entries()) total += entry.bytes();
  EXPECT_EQ(index["metadata"]["total_size"], total);
}

TEST_F(GgufLlamaTest, ConfigHasWhatTransformersNeeds) {
  const auto c = config(tiny());
  EXPECT_EQ(c["architectures"][0], "LlamaForCausalLM");
  EXPECT_EQ(c["model_type"], "llama");
  EXPECT_EQ(c["hidden_size"], kHidden);
  EXPECT_EQ(c["num_key_value_heads"], kKvHeads);
  EXPECT_EQ(c["head_dim"], kHeadDim);
  EXPECT_EQ(c["vocab_size"], kVocab);
  EXPECT_EQ(c["rms_norm_eps"], 1e-05);
  EXPECT_EQ(c["rope_theta"], 500000.0);
  EXPECT_EQ(c["tie_word_embeddings"], true);
  EXPECT_EQ(c["torch_dtype"], "bfloat16");
  EXPECT_EQ(c["bos_token_id"], 1);
  EXPECT_EQ(c["eos_token_id"], 2);
  EXPECT_TRUE(c["rope_scaling"].is_null());

  GgufBytes untied = tiny();
  untied.tensor("output.weight", {kVocab, kHidden}, values(kVocab, kHidden, 110));
  untied.u32("tokenizer.ggml.eot_token_id", 3);
  const auto u = config(untied);
  EXPECT_EQ(u["tie_word_embeddings"], false);
  EXPECT_EQ(u["eos_token_id"], (nlohmann::json{2, 3}));
}

TEST_F(GgufLlamaTest, RopeScaling) {
  GgufBytes linear = tiny();
  linear.text("llama.rope.scaling.type", "linear");
  linear.f32("llama.rope.scaling.factor", 4);
  EXPECT_EQ(config(linear)["rope_scaling"],
            (nlohmann::json{{"rope_type", "linear"}, {"factor", 4.0}}));

  // With this theta the second wavelength is beyond 8192, so that it gets the whole factor.
  GgufBytes llama3 = tiny();
  llama3.values[8] = GgufBytes::sized("llama.rope.freq_base") + GgufBytes::number<uint32_t>(6) +
                     GgufBytes::number(1e7F);
  llama3.tensor("rope_freqs.weight", {2}, {1, 8});
  EXPECT_EQ(config(llama3)["rope_scaling"],
            (nlohmann::json{{"rope_type", "llama3"},
                            {"factor", 8.0},
                            {"low_freq_factor", 1.0},
                            {"high_freq_factor", 4.0},
                            {"original_max_position_embeddings", 8192}}));
  GgufBytes other_factors = tiny();
  other_factors.tensor("rope_freqs.weight", {2}, {1, 8});
  EXPECT_NE(
      error_of(other_factors, Code::kUnimplemented).find("tensor rope_freqs.weight: value 1 is 8"),
      std::string::npos);

  GgufBytes other = tiny();
  other.text("llama.rope.scaling.type", "yarn");
  other.f32("llama.rope.scaling.factor", 4);
  EXPECT_NE(error_of(other, Code::kInvalidArgument)
                .find("llama.rope.scaling.original_context_length"),
            std::string::npos);
  GgufBytes longrope = tiny();
  longrope.text("llama.rope.scaling.type", "longrope");
  longrope.f32("llama.rope.scaling.factor", 4);
  EXPECT_EQ(error_of(longrope, Code::kUnimplemented),
            "llama.rope.scaling.type: found \"longrope\", expected \"none\", \"linear\" or "
            "\"yarn\"");
}

TEST_F(GgufLlamaTest, Qwen2HasBiasesAndNoPermutation) {
  GgufBytes bytes = tiny("qwen2");
  bytes.tensor("blk.0.attn_q.bias", {kHidden}, values(1, kHidden, 1));
  bytes.tensor("blk.0.attn_k.bias", {kHeadDim}, values(1, kHeadDim, 2));
  bytes.tensor("blk.0.attn_v.bias", {kHeadDim}, values(1, kHeadDim, 3));
  const GgufFile file = open(bytes);
  const GgufLlama model(file, tensor::DType::kF32);
  model.write_weights(dir_, 1 << 30, [](int64_t) {});
  auto tensors = read_back("model.safetensors");
  EXPECT_EQ(tensors["model.layers.0.self_attn.q_proj.weight"], values(kHidden, kHidden, 20));
  EXPECT_EQ(tensors["model.layers.0.self_attn.q_proj.bias"], values(1, kHidden, 1));
  EXPECT_EQ(parse_json(model.config_json(), "config")["architectures"][0], "Qwen2ForCausalLM");
}

TEST_F(GgufLlamaTest, BiasesOfLlamaArePermuted) {
  GgufBytes bytes = tiny();
  bytes.tensor("blk.0.attn_q.bias", {kHidden}, {0, 1, 2, 3, 4, 5, 6, 7});
  bytes.tensor("blk.0.attn_k.bias", {kHeadDim}, {0, 1, 2, 3});
  bytes.tensor("blk.0.attn_v.bias", {kHeadDim}, {0, 1, 2, 3});
  bytes.tensor("blk.0.attn_output.bias", {kHidden}, values(1, kHidden, 3));
  const GgufFile file = open(bytes);
  const GgufLlama model(file, tensor::DType::kF32);
  model.write_weights(dir_, 1 << 30, [](int64_t) {});
  auto tensors = read_back("model.safetensors");
  EXPECT_EQ(tensors["model.layers.0.self_attn.q_proj.bias"],
            (std::vector<float>{0, 2, 1, 3, 4, 6, 5, 7}));
  EXPECT_EQ(tensors["model.layers.0.self_attn.v_proj.bias"], (std::vector<float>{0, 1, 2, 3}));
  EXPECT_EQ(parse_json(model.config_json(), "config")["attention_bias"], true);
}

TEST_F(GgufLlamaTest, WhatDoesNotFitIsNamed) {
  EXPECT_EQ(error_of(tiny("mamba"), Code::kUnimplemented),
            "general.architecture: found \"mamba\", expected \"llama\", \"qwen2\" or \"qwen3\"");
  GgufBytes file = tiny();
  file.tensors.pop_back();
  EXPECT_EQ(error_of(file, Code::kInvalidArgument), "tensor output_norm.weight is missing");
  file = tiny();
  file.tensor("blk.0.extra", {2}, {1, 2});
  EXPECT_EQ(error_of(file, Code::kUnimplemented),
            "tensor blk.0.extra is not known in the architecture llama");
  file = tiny();
  file.tensors[2].dimensions = {4, 16};
  EXPECT_EQ(error_of(file, Code::kInvalidArgument),
            "tensor blk.0.attn_q.weight: found shape [16, 4], expected [8, 8] from the metadata");
  file = tiny();
  file.u32("llama.expert_count", 8);
  EXPECT_NE(error_of(file, Code::kInvalidArgument).find("llama.expert_used_count"),
            std::string::npos);
  file.u32("llama.expert_used_count", 9);
  EXPECT_EQ(error_of(file, Code::kInvalidArgument),
            "llama.expert_used_count: found 9, expected at most llama.expert_count = 8");
  file = tiny("qwen2");
  file.u32("qwen2.expert_count", 8);
  EXPECT_NE(error_of(file, Code::kUnimplemented).find("only those of the architecture llama"),
            std::string::npos);
  file = tiny();
  file.u32("llama.rope.dimension_count", 2);
  EXPECT_NE(error_of(file, Code::kUnimplemented).find("partial rotation cannot be imported"),
            std::string::npos);
  file = tiny();
  file.values[1] = GgufBytes::sized("llama.block_count") + GgufBytes::number<uint32_t>(4) +
                   GgufBytes::number<uint32_t>(0);
  EXPECT_EQ(error_of(file, Code::kInvalidArgument),
            "llama.block_count: found 0, expected 1 to 16777216");
}

// A tiny file with three experts instead of an MLP.
GgufBytes with_experts(bool stacked) {
  GgufBytes file = tiny();
  file.u32("llama.expert_count", 3);
  file.u32("llama.expert_used_count", 2);
  const GgufBytes plain = file;
  file.tensors.clear();
  for (const GgufBytes::Tensor& t : plain.tensors) {
    if (t.name.find("blk.0.ffn_gate.") == 0 || t.name.find("blk.0.ffn_up.") == 0 ||
        t.name.find("blk.0.ffn_down.") == 0)
      continue;
    std::vector<float> data(t.data.size() / sizeof(float));
    std::memcpy(data.data(), t.data.data(), t.data.size());
    file.tensor(t.name, {t.dimensions.rbegin(), t.dimensions.rend()}, data);
  }
  file.tensor("blk.0.ffn_gate_inp.weight", {3, kHidden}, values(3, kHidden, 200));
  for (const auto& [name, rows, columns, tensor] :
       {std::tuple{"ffn_gate", kIntermediate, kHidden, 300.0F},
        {"ffn_down", kHidden, kIntermediate, 400.0F},
        {"ffn_up", kIntermediate, kHidden, 500.0F}}) {
    if (stacked) {
      file.tensor(fmt::format("blk.0.{}_exps.weight", name), {3, rows, columns},
                  values(3 * rows, columns, tensor));
      continue;
    }
    const auto all = values(3 * rows, columns, tensor);
    for (int64_t e = 0; e < 3; ++e)
      file.tensor(fmt::format("blk.0.{}.{}.weight", name, e), {rows, columns},
                  {all.begin() + e * rows * columns, all.begin() + (e + 1) * rows * columns});
  }
  return file;
}

TEST_F(GgufLlamaTest, ExpertsBecomeThoseOfMixtral) {
  for (const bool stacked : {true, false}) {
    const GgufBytes bytes = with_experts(stacked);
    const auto json = config(bytes);
    EXPECT_EQ(json["model_type"], "mixtral");
    EXPECT_EQ(json["architectures"][0], "MixtralForCausalLM");
    EXPECT_EQ(json["num_local_experts"], 3);
    EXPECT_EQ(json["num_experts_per_tok"], 2);
    const GgufFile file = open(bytes);
    GgufLlama(file, tensor::DType::kF32).write_weights(dir_, 1 << 30, [](int64_t) {});
    auto tensors = read_back("model.safetensors");
    EXPECT_EQ(tensors.size(), 8U + 1U + 9U);
    const std::string block = "model.layers.0.block_sparse_moe.";
    EXPECT_EQ(tensors[block + "gate.weight"], values(3, kHidden, 200));
    for (int64_t e = 0; e < 3; ++e) {
      const std::string expert = fmt::format("{}experts.{}.", block, e);
      EXPECT_EQ(tensors[expert + "w1.weight"],
                values(kIntermediate, kHidden, 300.0F + static_cast<float>(e * kIntermediate)));
      EXPECT_EQ(tensors[expert + "w2.weight"],
                values(kHidden, kIntermediate, 400.0F + static_cast<float>(e * kHidden)));
      EXPECT_EQ(tensors[expert + "w3.weight"],
                values(kIntermediate, kHidden, 500.0F + static_cast<float>(e * kIntermediate)));
    }
  }
}

TEST_F(GgufLlamaTest, Qwen3HasNormsAndYarn) {
  GgufBytes bytes = tiny("qwen3");
  bytes.text("qwen3.rope.scaling.type", "yarn");
  bytes.f32("qwen3.rope.scaling.factor", 4);
  bytes.u32("qwen3.rope.scaling.original_context_length", 64);
  bytes.tensor("blk.0.attn_q_norm.weight", {kHeadDim}, values(1, kHeadDim, 600));
  bytes.tensor("blk.0.attn_k_norm.weight", {kHeadDim}, values(1, kHeadDim, 700));
  const auto json = config(bytes);
  EXPECT_EQ(json["model_type"], "qwen3");
  EXPECT_EQ(json["rope_scaling"]["rope_type"], "yarn");
  EXPECT_EQ(json["rope_scaling"]["factor"], 4.0);
  EXPECT_EQ(json["rope_scaling"]["original_max_position_embeddings"], 64);
  const GgufFile file = open(bytes);
  GgufLlama(file, tensor::DType::kF32).write_weights(dir_, 1 << 30, [](int64_t) {});
  auto tensors = read_back("model.safetensors");
  EXPECT_EQ(tensors["model.layers.0.self_attn.q_norm.weight"], values(1, kHeadDim, 600));
  // Not permuted, unlike llama's.
  EXPECT_EQ(tensors["model.layers.0.self_attn.k_proj.weight"], values(kHeadDim, kHidden, 30));
}

TEST_F(GgufLlamaTest, ValuesBeyondHalfAreRefused) {
  GgufBytes file = tiny();
  std::vector<float> big = values(1, kHidden, 100);
  big[3] = 1e6F;
  std::memcpy(file.tensors.back().data.data(), big.data(), file.tensors.back().data.size());
  EXPECT_EQ(error_of(file, Code::kInvalidArgument, tensor::DType::kF16),
            "tensor output_norm.weight: value 1000000 is beyond f16. Fix: --dtype bf16 or f32");
  EXPECT_FALSE(std::filesystem::exists(dir_ + "/model.safetensors"));
  EXPECT_FALSE(std::filesystem::exists(dir_ + "/model.safetensors.part"));
}

}  // namespace
}  // namespace phalanx::weights
