#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "phalanx/base/json.h"
#include "phalanx/models/registry.h"
#include "phalanx/weights/checkpoint.h"

namespace phalanx::models {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

const std::string kData = PHALANX_ORACLE_DIR;

class Config : public ::testing::Test {
 protected:
  Config()
      : directory_(fs::temp_directory_path() / ("phalanx-config-" + std::to_string(::getpid()))) {
    fs::remove_all(directory_);
    fs::create_directory(directory_);
  }
  ~Config() override { fs::remove_all(directory_); }

  // A directory with the weights of `name` and its config.json changed by `patch`.
  std::string patched(const std::string& name, const std::string& patch) {
    for (const auto& file : fs::directory_iterator(kData + "/" + name)) {
      fs::remove(directory_ / file.path().filename());
      if (file.path().filename() != "config.json")
        fs::create_symlink(file.path(), directory_ / file.path().filename());
    }
    json config = read_json_file(kData + "/" + name + "/config.json");
    config.merge_patch(json::parse(patch));
    std::ofstream(directory_ / "config.json") << config;
    return directory_;
  }
  // What is said of untied_f32 with a change to its config.json.
  std::string refusal(const std::string& patch) {
    try {
      (void)read_model_info(patched("untied_f32", patch));
      return "";
    } catch (const Error& e) {
      return e.what();
    }
  }
  fs::path directory_;
};

#define EXPECT_SAYS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST_F(Config, BothSpellings) {
  const DecoderConfig five = read_config(kData + "/linear_f16").config;
  EXPECT_EQ(five.info.model_type, "llama");
  EXPECT_EQ(five.info.dtype, tensor::DType::kF16);
  EXPECT_EQ(five.info.act, tensor::DType::kF32);
  EXPECT_EQ(five.rotary.type, layers::RotaryConfig::Type::kLinear);
  EXPECT_EQ(five.rotary.factor, 4.0);
  const DecoderConfig four = read_config(kData + "/llama3_bf16").config;
  EXPECT_EQ(four.info.act, tensor::DType::kBF16);
  EXPECT_EQ(four.rotary.type, layers::RotaryConfig::Type::kLlama3);
  EXPECT_EQ(four.rotary.theta, 10000.0);
  EXPECT_EQ(four.rotary.original_max_position_embeddings, 64);
  EXPECT_EQ(four.info.hidden_size, 54);
  EXPECT_EQ(four.info.head_dim, 10);
  // What LLaMA 2 wrote: no head_dim, no rope keys, "type" in rope_scaling.
  const DecoderConfig two =
      read_config(patched("untied_f32", R"({"head_dim": null, "rope_parameters": null,
        "hidden_size": 60, "rope_scaling": {"type": "linear", "factor": 2}, "dtype": null,
        "torch_dtype": "float16"})"))
          .config;
  EXPECT_EQ(two.info.head_dim, 10);
  EXPECT_EQ(two.rotary.type, layers::RotaryConfig::Type::kLinear);
  EXPECT_EQ(two.rotary.theta, 10000.0);
  EXPECT_EQ(two.info.dtype, tensor::DType::kF16);
}

TEST_F(Config, ParameterBytesAreThoseOfTheFile) {
  for (const std::string name : {"untied_f32", "tied_bf16", "biases_f16"}) {
    const weights::Checkpoint checkpoint(kData + "/" + name);
    int64_t bytes = 0;
    for (const auto& [tensor, entry] : checkpoint.tensors()) bytes += entry.bytes;
    EXPECT_EQ(read_model_info(kData + "/" + name).parameter_bytes, bytes) << name;
  }
}

TEST_F(Config, RefusalsNameKeyFoundAndExpected) {
  EXPECT_SAYS(refusal(R"({"model_type": "gpt9"})"),
              "config.json: model_type: unknown model family, found gpt9, expected one of llama, "
              "mistral, qwen2");
  EXPECT_SAYS(refusal(R"({"model_type": null})"), "model_type: key missing");
  EXPECT_SAYS(refusal(R"({"hidden_size": null})"), "config.json: hidden_size: key missing");
  EXPECT_SAYS(refusal(R"({"hidden_size": "54"})"),
              R"(hidden_size: wrong type, found "54", expected an integer from 1 to)");
  EXPECT_SAYS(refusal(R"({"hidden_size": 0})"), "hidden_size: out of range, found 0");
  EXPECT_SAYS(refusal(R"({"vocab_size": 99999999999999999999})"), "vocab_size: wrong type");
  EXPECT_SAYS(refusal(R"({"vocab_size": 18446744073709551615})"), "vocab_size: out of range");
  EXPECT_SAYS(refusal(R"({"num_key_value_heads": 4})"),
              "num_key_value_heads: does not divide the query heads, found 4, expected a divisor of "
              "num_attention_heads = 6");
  EXPECT_SAYS(refusal(R"({"head_dim": 9})"), "head_dim: odd head_dim, found 9");
  EXPECT_SAYS(refusal(R"({"hidden_act": "gelu"})"),
              R"(hidden_act: unsupported activation, found "gelu", expected silu)");
  EXPECT_SAYS(refusal(R"({"dtype": "int8"})"),
              R"(dtype: unknown dtype, found "int8", expected bfloat16, float16 or float32)");
  EXPECT_SAYS(refusal(R"({"dtype": null})"), "torch_dtype: key missing");
  EXPECT_SAYS(refusal(R"({"rope_parameters": {"rope_type": "longrope", "factor": 2}})"),
              R"(rope_parameters.rope_type: unsupported rotary scaling, found "longrope", expected one of default, linear, dynamic, llama3, yarn)");
  EXPECT_SAYS(refusal(R"({"rope_parameters": {"rope_type": "dynamic"}})"),
              "rope_parameters.factor: key missing");
  EXPECT_SAYS(refusal(R"({"rope_parameters": {"rope_type": "llama3"}})"),
              "rope_parameters.low_freq_factor: key missing");
  EXPECT_SAYS(refusal(R"({"rope_parameters": {"partial_rotary_factor": 0.5}})"),
              "rope_parameters.partial_rotary_factor: odd rotary dimensions, found 0.5");
  EXPECT_SAYS(refusal(R"({"rope_parameters": 7})"), "rope_parameters: wrong type, found 7");
  EXPECT_SAYS(refusal(R"({"quantization_config": {"quant_method": "awq"}})"),
              "no quantised tensors found");
  EXPECT_SAYS(refusal(R"({"tie_word_embeddings": "no"})"),
              R"(tie_word_embeddings: wrong type, found "no", expected true or false)");
  EXPECT_SAYS(refusal(R"({"rms_norm_eps": -1})"), "rms_norm_eps: out of range, found -1");
  // All at once.
  EXPECT_SAYS(refusal(R"({"hidden_size": 0, "vocab_size": 0, "hidden_act": "relu"})"),
              "(3 problems)");
  EXPECT_EQ(refusal("{}"), "");
}

TEST_F(Config, CheckpointsThatDoNotFitAreRefusedTensorByTensor) {
  const auto said = [](const std::string& directory) -> std::string {
    try {
      check_checkpoint(directory);
      return "";
    } catch (const Error& e) {
      return e.what();
    }
  };
  for (const auto& entry : fs::directory_iterator(kData))
    if (entry.is_directory()) {
      EXPECT_EQ(said(entry.path()), "");
    }
  std::string text = said(patched("untied_f32", R"({"intermediate_size": 71})"));
  EXPECT_SAYS(text, "(6 problems)");
  EXPECT_SAYS(text,
              "model.safetensors: tensor model.layers.1.mlp.up_proj.weight: tensor of another shape, "
              "found [70, 54], expected [71, 54]");
  text = said(patched("untied_f32", R"({"num_hidden_layers": 3})"));
  EXPECT_SAYS(text, "tensor model.layers.2.input_layernorm.weight: tensor is absent, expected shape [54]");
  text = said(patched("untied_f32", R"({"dtype": "bfloat16"})"));
  EXPECT_SAYS(text, "tensor lm_head.weight: tensor of another dtype, found f32, expected bf16");
  EXPECT_SAYS(text, "torch_dtype (or dtype) in config.json");
  text = said(patched("tied_bf16", R"({"tie_word_embeddings": false})"));
  EXPECT_SAYS(text, "tensor lm_head.weight: tensor is absent");
  EXPECT_THROW((void)read_model_info(directory_ / "nowhere"), Error);
}

TEST_F(Config, MemoryIsKnownBeforeItIsTaken) {
  for (const ops::Isa isa : ops::available_isas()) {
    const ops::Context::Options options{.isa = isa, .max_tokens = 33, .max_k = 70, .max_rows = 170,
                                        .max_heads = 6, .max_head_dim = 10, .max_context = 700};
    ThreadPool pool({.threads = 2});
    EXPECT_EQ(ops::Context::bytes_for(options, 2), ops::Context(options, pool).scratch_bytes());
  }
  const ModelInfo info = read_model_info(kData + "/tied_bf16");
  const MemoryNeed need = memory_need(info, {.max_step_tokens = 100, .max_step_rows = 10,
                                             .max_sequence = 200, .block_size = 16,
                                             .weights = {1.0}});
  // Packed weights are the stored ones but for padding and norms in f32.
  EXPECT_GE(need.weight_bytes, info.parameter_bytes);
  EXPECT_LE(need.weight_bytes, info.parameter_bytes * 12 / 10);
  EXPECT_EQ(need.read_bytes, info.parameter_bytes);
  EXPECT_EQ(need.kv_bytes_per_block, 2 * 2 * 3 * 10 * 16 * 2);
  // Latent rows are stored once: 2 layers, 22 + 6 values.
  ModelOptions latent{.max_step_tokens = 8, .max_step_rows = 1, .max_sequence = 64,
                      .block_size = 16, .weights = {1.0, 1.0}};
  const ModelInfo deepseek = read_model_info(kData + "/deepseek_v3");
  EXPECT_EQ(memory_need(deepseek, latent).kv_bytes_per_block, 2 * 28 * 16 * 2);
  latent.kv = KvDtype::kInt8;
  EXPECT_EQ(memory_need(deepseek, latent).kv_bytes_per_block, 2 * (28 + 4) * 16);
  const int64_t step = 54 * 4 + (54 + 120 + 60 + 54 + 70) * 2;  // activations of one token
  EXPECT_GE(need.workspace_bytes, 100 * step + 200 * 10 * 4);
  EXPECT_LE(need.workspace_bytes, 100 * step + 200 * 10 * 4 + 10 * (54 * 4 + 60 * 2) + 2048);
}

TEST_F(Config, LayoutCoversEverythingOnce) {
  const ModelInfo info = read_model_info(kData + "/nine_heads_f32");
  for (int ranks = 1; ranks <= 9; ++ranks) {
    for (const bool uneven : {false, true}) {
      std::vector<double> weights(static_cast<size_t>(ranks), 1.0);
      if (uneven) weights.front() = 2.5;
      const auto layout = plan_layout(info, weights);
      ASSERT_EQ(layout.size(), weights.size());
      RankLayout end;
      for (const RankLayout& rank : layout) {
        EXPECT_EQ(rank.query_heads.begin, end.query_heads.end);
        EXPECT_EQ(rank.hidden_rows.begin, end.hidden_rows.end);
        EXPECT_EQ(rank.mlp_rows.begin, end.mlp_rows.end);
        EXPECT_EQ(rank.vocab_rows.begin, end.vocab_rows.end);
        for (int64_t h = rank.query_heads.begin; h < rank.query_heads.end; ++h)
          EXPECT_TRUE(rank.kv_heads.contains(h / 3));
        end = rank;
      }
      EXPECT_EQ(end.query_heads.end, 9);
      EXPECT_EQ(end.hidden_rows.end, info.hidden_size);
      EXPECT_EQ(end.mlp_rows.end, info.intermediate_size);
      EXPECT_EQ(end.vocab_rows.end, info.vocab_size);
    }
  }
  try {
    (void)plan_layout(info, std::vector<double>(10, 1.0));
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::kInvalidArgument);
    EXPECT_SAYS(std::string(e.what()), "found 10 ranks, expected at most 9, the query heads");
  }
}

}  // namespace
}  // namespace phalanx::models
