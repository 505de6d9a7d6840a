#pragma once

// Committed checkpoints and the logits that transformers gives them (tests/oracle).

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "phalanx/base/json.h"
#include "phalanx/layers/widen.h"
#include "phalanx/models/test_ranks.h"
#include "phalanx/weights/safetensors_writer.h"
#include "phalanx/weights/weight_source.h"

namespace phalanx::models {

inline std::string oracle_directory(const std::string& name) {
  return std::string(PHALANX_ORACLE_DIR) + "/" + name;
}

struct Reference {
  std::vector<int32_t> tokens;
  std::vector<float> logits;     // [tokens, vocab]
  std::vector<int32_t> greedy;   // that follow the first eight tokens
  double std = 0;
};

inline Reference read_reference(const std::string& name) {
  const nlohmann::json json = read_json_file(oracle_directory(name) + "/reference.json");
  const std::string raw = read_text_file(oracle_directory(name) + "/logits.f32", 1 << 20);
  Reference reference{.std = json["std"].get<double>()};
  if (json.contains("tokens")) reference.tokens = json["tokens"].get<std::vector<int32_t>>();
  if (json.contains("greedy")) reference.greedy = json["greedy"].get<std::vector<int32_t>>();
  reference.logits.resize(raw.size() / sizeof(float));
  std::memcpy(reference.logits.data(), raw.data(), raw.size());
  return reference;
}

// Largest difference in standard deviations of the reference.
inline double difference(const Reference& reference, const std::vector<float>& logits) {
  EXPECT_EQ(logits.size(), reference.logits.size());
  double worst = 0;
  for (size_t i = 0; i < std::min(logits.size(), reference.logits.size()); ++i) {
    if (!std::isfinite(logits[i])) return INFINITY;
    worst = std::max(worst, std::abs(static_cast<double>(logits[i]) - reference.logits[i]));
  }
  return worst / reference.std;
}

// Of a teacher-forced run.
inline double difference(const Reference& reference, RunOptions options) {
  return difference(reference, run_steps(options, {{.slices = {{.tokens = reference.tokens}}}}));
}

// A directory of its own, removed at the end.
class TestDirectory {
 public:
  explicit TestDirectory(const std::string& name)
      : path_(std::filesystem::temp_directory_path() /
              ("phalanx-" + name + "-" + std::to_string(::getpid()))) {
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~TestDirectory() { std::filesystem::remove_all(path_); }
  TestDirectory(const TestDirectory&) = delete;
  TestDirectory& operator=(const TestDirectory&) = delete;
  [[nodiscard]] std::string path() const { return path_; }

 private:
  std::filesystem::path path_;
};

// The checkpoint `from` with a changed config.json and, if wanted, its weights widened to f32.
inline void copy_checkpoint(const std::string& from, const std::string& to,
                            const nlohmann::json& patch, bool widened) {
  namespace fs = std::filesystem;
  for (const auto& file : fs::directory_iterator(from)) {
    const std::string name = file.path().filename();
    if (name == "config.json" || (widened && name.find(".safetensors") != std::string::npos))
      continue;
    fs::create_symlink(file.path(), to + "/" + name);
  }
  nlohmann::json config = read_json_file(from + "/config.json");
  if (widened) {
    config[config.contains("dtype") ? "dtype" : "torch_dtype"] = "float32";
    const weights::Checkpoint checkpoint(from);
    weights::WeightSource source(checkpoint);
    std::vector<weights::NewTensor> entries;
    for (const auto& [name, entry] : checkpoint.tensors())
      entries.push_back({.name = name, .dtype = tensor::DType::kF32, .shape = entry.shape});
    weights::SafetensorsWriter writer(to + "/model.safetensors", entries);
    for (const auto& [name, entry] : checkpoint.tensors()) {
      std::vector<std::byte> stored(static_cast<size_t>(entry.bytes));
      source.read_rows(entry, 0, entry.rows(), stored.data());
      std::vector<float> values(stored.size() / tensor::dtype_bytes(entry.dtype));
      layers::widen(stored.data(), entry.dtype, static_cast<int64_t>(values.size()), values.data());
      writer.append(std::as_bytes(std::span(values)));
    }
    writer.finish();
  }
  config.merge_patch(patch);
  std::ofstream(to + "/config.json") << config;
}

}  // namespace phalanx::models
