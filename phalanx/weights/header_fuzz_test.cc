// Damaged headers of weight files: whatever the bytes, they are accepted or refused by an Error.
// PHALANX_FUZZ_SECONDS per parser; `make fuzz`.

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iostream>

#include "phalanx/base/fuzz.h"
#include "phalanx/weights/checkpoint.h"
#include "phalanx/weights/gguf.h"
#include "phalanx/weights/gguf_llama.h"
#include "phalanx/weights/gguf_testing.h"

namespace phalanx::weights {
namespace {

namespace fs = std::filesystem;

std::string safetensors(const std::string& header, size_t data) {
  return GgufBytes::number<uint64_t>(header.size()) + header + std::string(data, '\1');
}

std::vector<std::string> safetensors_seeds() {
  return {safetensors(R"({"a":{"dtype":"BF16","shape":[3,2],"data_offsets":[0,12]},)"
                      R"("b":{"dtype":"F32","shape":[2],"data_offsets":[12,20]}})",
                      20),
          safetensors(R"({"__metadata__":{"format":"pt"},"x":{"dtype":"I8","shape":[],)"
                      R"("data_offsets":[0,1]},"none":{"dtype":"F16","shape":[0,4],)"
                      R"("data_offsets":[1,1]}})",
                      1)};
}

// What a reader does with a header that it took: every byte of every tensor.
void read_everything(const Checkpoint& checkpoint) {
  for (const auto& [name, entry] : checkpoint.tensors()) {
    ASSERT_GE(entry.bytes, 0);
    ASSERT_LT(entry.bytes, 1 << 20);
    std::vector<char> bytes(static_cast<size_t>(entry.bytes) + 1);
    ASSERT_EQ(::pread(checkpoint.fd_of(entry), bytes.data(), static_cast<size_t>(entry.bytes),
                      entry.offset),
              entry.bytes);
    ASSERT_GE(entry.row_bytes(), 0);
  }
}

class HeaderFuzz : public ::testing::Test {
 protected:
  HeaderFuzz()
      : directory_(fs::path("/dev/shm") / ("phalanx-fuzz-" + std::to_string(::getpid()))) {
    fs::remove_all(directory_);
    fs::create_directory(directory_);
  }
  ~HeaderFuzz() override { fs::remove_all(directory_); }
  void write(const std::string& name, const std::string& bytes) const {
    std::ofstream(directory_ / name, std::ios::binary) << bytes;
  }
  fs::path directory_;
};

TEST_F(HeaderFuzz, Safetensors) {
  const int64_t tried = fuzz(safetensors_seeds(), [&](const std::string& bytes, int64_t number) {
    SCOPED_TRACE(number);
    write("model.safetensors", bytes);
    try {
      read_everything(Checkpoint(directory_.string()));
    } catch (const Error&) {
    }
  });
  std::cout << tried << " headers\n";
  EXPECT_GT(tried, 10);
}

TEST_F(HeaderFuzz, Index) {
  write("one.safetensors", safetensors_seeds()[0]);
  write("two.safetensors", safetensors_seeds()[1]);
  const std::string index =
      R"({"metadata":{"total_size":21},"weight_map":{"a":"one.safetensors","b":"one.safetensors",)"
      R"("x":"two.safetensors","none":"two.safetensors"}})";
  const int64_t tried = fuzz({index}, [&](const std::string& bytes, int64_t number) {
    SCOPED_TRACE(number);
    write("model.safetensors.index.json", bytes);
    try {
      const Checkpoint checkpoint(directory_.string());
      read_everything(checkpoint);
      for (const auto& [name, entry] : checkpoint.tensors()) {
        const fs::path path = checkpoint.path_of(entry);
        ASSERT_EQ(path.parent_path(), directory_) << bytes;
      }
    } catch (const Error&) {
    }
  });
  std::cout << tried << " indices\n";
  EXPECT_GT(tried, 10);
}

TEST_F(HeaderFuzz, Gguf) {
  GgufBytes plain;
  plain.text("general.architecture", "llama");
  plain.u32("llama.block_count", 1);
  plain.texts("tokens", {"a", "bc"});
  plain.integers("types", {1, 2});
  plain.flag("flag", true);
  plain.tensor("matrix", {3, 2}, {1, 2, 3, 4, 5, 6});
  GgufBytes model;
  model.text("general.architecture", "llama");
  for (const auto& [key, value] : {std::pair{"block_count", 1}, {"embedding_length", 4},
                                   {"feed_forward_length", 4}, {"attention.head_count", 2},
                                   {"context_length", 16}, {"expert_count", 2},
                                   {"expert_used_count", 1}})
    model.u32(std::string("llama.") + key, static_cast<uint32_t>(value));
  model.f32("llama.attention.layer_norm_rms_epsilon", 1e-5F);
  const std::vector<float> square(16, 1.0F);
  for (const char* name : {"token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight",
                           "blk.0.attn_v.weight", "blk.0.attn_output.weight"})
    model.tensor(name, {4, 4}, square);
  for (const char* name : {"blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"})
    model.tensor(name, {4}, {1, 1, 1, 1});
  model.tensor("blk.0.ffn_gate_inp.weight", {2, 4}, std::vector<float>(8, 1.0F));
  for (const char* name : {"gate", "up", "down"})
    model.tensor(std::string("blk.0.ffn_") + name + "_exps.weight", {2, 4, 4},
                 std::vector<float>(32, 1.0F));
  const std::vector<std::string> seeds = {plain.bytes(), model.bytes(), model.bytes()};
  const std::string path = directory_ / "model.gguf";
  int64_t mapped = 0;
  const int64_t tried = fuzz(seeds, [&](const std::string& bytes, int64_t number) {
    SCOPED_TRACE(number);
    write("model.gguf", bytes);
    try {
      const GgufFile file = GgufFile::open(path);
      for (const GgufTensor& tensor : file.tensors()) {
        ASSERT_LE(tensor.rows() * tensor.row_elements(), 1 << 20);
        std::vector<float> row(static_cast<size_t>(tensor.rows() * tensor.row_elements()));
        file.read_rows(tensor, 0, row);
      }
      const GgufLlama llama(file, tensor::DType::kF32);
      (void)llama.config_json();
      llama.write_weights(directory_.string(), 1 << 20, [](int64_t) {});
      ++mapped;
    } catch (const Error&) {
    }
  });
  std::cout << tried << " files, " << mapped << " imported\n";
  EXPECT_GT(tried, 10);
}

}  // namespace
}  // namespace phalanx::weights
