#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "phalanx/base/error.h"
#include "phalanx/weights/gguf.h"
#include "phalanx/weights/safetensors_writer.h"

namespace phalanx::weights {

// A GGUF file of the architectures llama (with experts: Mixtral), qwen2 and qwen3 as a Hugging Face
// checkpoint. Everything is
// verified at construction: every tensor that the configuration asks for is there in its shape, and
// none is left over. Refers to the file, which must outlive it.
//
// GGUF stores q_proj and k_proj of llama permuted (neighbouring values rotate together, Hugging
// Face's halves do); this is undone. The inverse of `permute` in llama.cpp's convert_hf_to_gguf.py.
class GgufLlama {
 public:
  // `dtype`: of the written tensors; kF32, kF16 or kBF16. Throws kInvalidArgument or kUnimplemented
  // (another architecture, scaling that config.json cannot express), naming key or tensor.
  GgufLlama(const GgufFile& file, tensor::DType dtype);

  [[nodiscard]] std::string config_json() const;
  [[nodiscard]] std::string generation_config_json() const;
  [[nodiscard]] int64_t context_length() const { return context_length_; }
  // In the order of the written files.
  [[nodiscard]] std::vector<NewTensor> entries() const;
  // Writes model.safetensors, or several files and their index, into `dir`. `advance` is called
  // with the bytes written since the last call. Needs some 64 MB of memory, however large the
  // model. Values beyond f16's range are refused when that is the target.
  void write_weights(const std::string& dir, int64_t max_shard_bytes,
                     const std::function<void(int64_t)>& advance) const;

 private:
  struct Source {
    NewTensor entry;
    const GgufTensor* tensor;
    int64_t heads;      // 0: not permuted
    int64_t first = 0;  // row of the tensor; of one expert among all
  };
  [[noreturn]] void fail(const std::string& what, Code code = Code::kInvalidArgument) const;
  [[nodiscard]] std::string key(const std::string& name) const {
    return architecture_ + "." + name;
  }
  [[nodiscard]] int64_t positive(const std::string& name) const;
  [[nodiscard]] int64_t positive(const std::string& name, int64_t otherwise) const;
  void read_configuration();
  void read_rope_scaling();
  void read_rope_factors(const GgufTensor& factors);
  void map_tensors();
  void map_experts(const std::string& to, const std::string& from,
                   std::set<std::string>& taken);
  void add(std::set<std::string>& taken, const std::string& name, const std::string& gguf_name,
           std::vector<int64_t> shape, int64_t heads = 0);
  void write_tensor(const Source& source, SafetensorsWriter& out,
                    const std::function<void(int64_t)>& advance) const;
  [[nodiscard]] std::vector<int64_t> end_ids() const;

  const GgufFile& file_;
  tensor::DType dtype_;
  std::string architecture_;
  int64_t layers_ = 0, hidden_ = 0, intermediate_ = 0, heads_ = 0, kv_heads_ = 0, head_dim_ = 0;
  int64_t vocab_ = 0, context_length_ = 0;
  int64_t experts_ = 0, experts_used_ = 0;  // 0: none
  float rms_norm_eps_ = 0, rope_theta_ = 0;
  bool tied_ = false, bias_ = false, output_bias_ = false;
  std::string rope_scaling_;  // JSON text, "null" without
  std::vector<Source> sources_;
};

}  // namespace phalanx::weights
