#include "apps/quantize.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "apps/new_directory.h"
#include "apps/smoothing.h"
#include "phalanx/base/json.h"
#include "phalanx/base/log.h"
#include "phalanx/base/progress.h"
#include "phalanx/layers/widen.h"
#include "phalanx/quant/quantise.h"
#include "phalanx/weights/checkpoint.h"
#include "phalanx/weights/safetensors_writer.h"
#include "phalanx/weights/weight_source.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;
using tensor::DType;
namespace fs = std::filesystem;

struct Format {
  std::string_view name;
  int bits = 8;
  int64_t group = 0;
  bool int8_activations = false;
};

constexpr Format kFormats[] = {{"w8a8-dynamic", 8, 0, true},
                               {"w8a16", 8, 0, false},
                               {"w4a16-g128", 4, 128, false},
                               {"w4a16-g64", 4, 64, false},
                               {"w4a16-g32", 4, 32, false}};

// Ends of the names of layers that are quantised: those of a decoder layer that read activations.
// Routers, embeddings, the head and the absorbed projections of latent attention stay float.
constexpr std::string_view kLayers[] = {
    ".q_proj",    ".k_proj",  ".v_proj",   ".o_proj",   ".qkv_proj", ".gate_proj",
    ".up_proj",   ".down_proj", ".gate_up_proj", ".q_a_proj", ".q_b_proj",
    ".kv_a_proj_with_mqa", ".w1", ".w2", ".w3"};

constexpr std::string_view kWeight = ".weight";

struct Arguments {
  std::string source;
  std::string out;
  std::string format;
  double shard_gb = 4.0;
};

bool is_float(DType t) { return t == DType::kF32 || t == DType::kF16 || t == DType::kBF16; }

bool quantises(const weights::TensorEntry& entry) {
  if (entry.shape.size() != 2 || !entry.name.ends_with(kWeight)) return false;
  const std::string_view layer = std::string_view(entry.name).substr(0, entry.name.size() - 7);
  return std::any_of(std::begin(kLayers), std::end(kLayers),
                     [&](std::string_view end) { return layer.ends_with(end); });
}

std::vector<weights::NewTensor> results_of(const weights::TensorEntry& entry, const Format& f) {
  if (!quantises(entry)) return {{entry.name, entry.dtype, entry.shape}};
  const std::string layer = entry.name.substr(0, entry.name.size() - kWeight.size());
  const int64_t n = entry.shape[0];
  const int64_t k = entry.shape[1];
  if (f.int8_activations)
    return {{layer + ".weight", DType::kI8, {n, k}}, {layer + ".weight_scale", DType::kF32, {n, 1}}};
  const int64_t per_word = 32 / f.bits;
  return {{layer + ".weight_packed", DType::kI32, {n, (k + per_word - 1) / per_word}},
          {layer + ".weight_scale", entry.dtype, {n, f.group == 0 ? 1 : k / f.group}},
          {layer + ".weight_shape", DType::kI64, {2}}};
}

json quantization_config(const Format& f, const std::vector<std::string>& left_float) {
  json weights = {{"num_bits", f.bits}, {"type", "int"}, {"symmetric", true}, {"dynamic", false},
                  {"strategy", f.group == 0 ? "channel" : "group"},
                  {"group_size", f.group == 0 ? json() : json(f.group)}, {"actorder", nullptr},
                  {"observer", "minmax"}};
  json input;
  if (f.int8_activations)
    input = {{"num_bits", 8}, {"type", "int"}, {"symmetric", true}, {"dynamic", true},
             {"strategy", "token"}};
  return {{"quant_method", "compressed-tensors"},
          {"format", f.int8_activations ? "int-quantized" : "pack-quantized"},
          {"quantization_status", "compressed"},
          {"kv_cache_scheme", nullptr},
          {"ignore", left_float},
          {"config_groups",
           {{"group_0",
             {{"targets", {"Linear"}}, {"weights", weights}, {"input_activations", input},
              {"output_activations", nullptr}}}}}};
}

template <typename T>
std::span<const std::byte> bytes_of(const std::vector<T>& v) {
  return std::as_bytes(std::span(v));
}

class Quantiser {
 public:
  Quantiser(const weights::Checkpoint& checkpoint, const Format& format, Smoothing smoothing)
      : checkpoint_(checkpoint),
        source_(checkpoint),
        format_(format),
        smoothing_(std::move(smoothing)) {}

  // append(bytes) receives the results_of one tensor, in their order.
  template <typename Append>
  void run(const weights::TensorEntry& entry, Append append) {
    buffer_.resize(static_cast<size_t>(entry.bytes));
    source_.read_rows(source_.ask(entry.name), 0, entry.rows(), buffer_.data());
    if (!quantises(entry)) {
      if (const auto s = smoothing_.divide.find(entry.name); s != smoothing_.divide.end()) {
        values_.resize(s->second.size());
        layers::widen(buffer_.data(), entry.dtype, entry.rows(), values_.data());
        for (size_t j = 0; j < values_.size(); ++j) values_[j] /= s->second[j];
        layers::narrow(values_.data(), entry.rows(), entry.dtype, buffer_.data());
      }
      return append(std::span<const std::byte>(buffer_));
    }
    const int64_t n = entry.shape[0];
    const int64_t k = entry.shape[1];
    values_.resize(static_cast<size_t>(n * k));
    layers::widen(buffer_.data(), entry.dtype, n * k, values_.data());
    const auto bad = std::find_if(values_.begin(), values_.end(),
                                  [](float v) { return !std::isfinite(v); });
    if (bad != values_.end())
      throw Error(Code::kInvalidArgument,
                  fmt::format("{}: tensor {}: found {} at [{}, {}], expected finite weights",
                              checkpoint_.path_of(entry), entry.name, *bad,
                              (bad - values_.begin()) / k, (bad - values_.begin()) % k));
    if (const auto s = smoothing_.multiply.find(entry.name); s != smoothing_.multiply.end())
      for (int64_t i = 0; i < n * k; ++i)
        values_[static_cast<size_t>(i)] *= s->second[static_cast<size_t>(i % k)];
    const DType scale_dtype = format_.int8_activations ? DType::kF32 : entry.dtype;
    const quant::QuantisedRows rows =
        quant::quantise_rows(values_, n, k, format_.bits, format_.group, scale_dtype);
    if (format_.int8_activations) {
      append(bytes_of(rows.codes));
      append(bytes_of(rows.scale));
      return;
    }
    append(bytes_of(quant::pack_words(rows.codes, n, k, format_.bits)));
    std::vector<std::byte> scale(rows.scale.size() * tensor::dtype_bytes(scale_dtype));
    layers::narrow(rows.scale.data(), static_cast<int64_t>(rows.scale.size()), scale_dtype,
                   scale.data());
    append(std::span<const std::byte>(scale));
    append(bytes_of(entry.shape));
  }

 private:
  const weights::Checkpoint& checkpoint_;
  weights::WeightSource source_;
  const Format& format_;
  Smoothing smoothing_;
  std::vector<std::byte> buffer_;
  std::vector<float> values_;
};

void check(const Arguments& a, const Format& f, const json& config,
           const weights::Checkpoint& checkpoint) {
  Problems problems;
  const std::string config_path = a.source + "/config.json";
  for (const char* key : {"quantization_config", "quantize", "compression_config"})
    if (config.contains(key) && !config[key].is_null())
      problems.add({.what = "already quantised", .where = fmt::format("{}: {}", config_path, key),
                    .expected = "a float checkpoint", .fix = "start from the float checkpoint"});
  int64_t count = 0;
  for (const auto& [name, entry] : checkpoint.tensors()) {
    if (!quantises(entry)) continue;
    ++count;
    const std::string where = fmt::format("{}: tensor {}", checkpoint.path_of(entry), name);
    if (!is_float(entry.dtype))
      problems.add({.what = "not a float tensor", .where = where,
                    .found = std::string(tensor::dtype_name(entry.dtype)),
                    .expected = "f32, f16 or bf16"});
    if (entry.shape[1] == 0 || (f.group != 0 && entry.shape[1] % f.group != 0))
      problems.add({.what = "width that groups do not divide", .where = where,
                    .found = fmt::format("{} columns, groups of {}", entry.shape[1], f.group),
                    .expected = "whole groups", .fix = "choose another --format"});
  }
  if (count == 0)
    problems.add({.what = "nothing to quantise", .where = checkpoint.directory(),
                  .found = fmt::format("{} tensors", checkpoint.tensors().size()),
                  .expected = "weights of linear layers with known names (q_proj, up_proj, ...)"});
  problems.throw_if_any(fmt::format("{} cannot be quantised to {}", a.source, f.name));
}

void copy_other_files(const std::string& from, const std::string& to) {
  for (const auto& file : fs::directory_iterator(from)) {
    const std::string name = file.path().filename();
    const bool weights = name.ends_with(".safetensors") || name.ends_with(".bin") ||
                         name.ends_with(".pth") || name.ends_with(".gguf") ||
                         name.ends_with(".index.json");
    if (file.is_regular_file() && !weights && name != "config.json" && !name.starts_with("."))
      fs::copy_file(file.path(), to + "/" + name);
  }
}

void quantize(const Arguments& a) {
  const Format& format = *std::find_if(std::begin(kFormats), std::end(kFormats),
                                       [&](const Format& f) { return f.name == a.format; });
  json config = read_json_file(a.source + "/config.json");
  if (!config.is_object())
    throw Error(Code::kInvalidArgument, a.source + "/config.json: expected an object");
  const weights::Checkpoint checkpoint(a.source);
  check(a, format, config, checkpoint);

  std::vector<weights::NewTensor> entries;
  std::vector<std::string> left_float;
  int64_t total = 0;
  for (const auto& [name, entry] : checkpoint.tensors()) {
    for (weights::NewTensor& t : results_of(entry, format)) entries.push_back(std::move(t));
    if (!quantises(entry) && entry.shape.size() == 2 && name.ends_with(kWeight))
      left_float.push_back(name.substr(0, name.size() - kWeight.size()));
    total += entry.bytes;
  }
  // Tied heads have no tensor of their own, and yet are a layer.
  if (std::find(left_float.begin(), left_float.end(), "lm_head") == left_float.end())
    left_float.emplace_back("lm_head");

  NewDirectory dir(a.out);
  Smoothing smoothing;
  if (format.int8_activations) {
    smoothing = find_smoothing(a.source, checkpoint);
    if (smoothing.why.empty())
      log_info("outliers of activations moved into the weights of {} layers",
               smoothing.multiply.size());
    else
      log_warn("outliers of activations stay where they are: {}", smoothing.why);
  }
  const auto shards = weights::plan_shards(entries, static_cast<int64_t>(a.shard_gb * 1e9));
  Progress progress(fmt::format("quantising {} to {}", fs::path(a.source).filename().string(),
                                format.name),
                    total, ProgressUnit::kBytes);
  Quantiser quantiser(checkpoint, format, std::move(smoothing));
  std::unique_ptr<weights::SafetensorsWriter> writer;
  size_t shard = 0;
  size_t in_shard = 0;  // tensors done
  const auto append = [&](std::span<const std::byte> bytes) {
    if (writer == nullptr)
      writer = std::make_unique<weights::SafetensorsWriter>(
          dir.part() + "/" + shards[shard].file_name, shards[shard].entries);
    writer->append(bytes);
    if (++in_shard == shards[shard].entries.size()) {
      writer->finish();
      writer.reset();
      in_shard = 0;
      ++shard;
    }
  };
  for (const auto& [name, entry] : checkpoint.tensors()) {
    quantiser.run(entry, append);
    progress.advance(entry.bytes);
  }
  if (shards.size() > 1)
    weights::write_file(dir.part() + "/model.safetensors.index.json", weights::shard_index(shards));
  copy_other_files(a.source, dir.part());
  config["quantization_config"] = quantization_config(format, left_float);
  weights::write_file(dir.part() + "/config.json", config.dump(2) + "\n");
  dir.finish();
  progress.done();
}

}  // namespace

int quantize_main(int argc, char** argv) {
  Arguments a;
  CLI::App app("Turns a float checkpoint into a quantised one (compressed-tensors layout)",
               "phalanx quantize");
  app.add_option("source", a.source, "Directory of a float checkpoint")->required();
  app.add_option("out_dir", a.out, "Directory to make; must not exist or be empty")->required();
  std::vector<std::string> names;
  for (const Format& f : kFormats) names.emplace_back(f.name);
  app.add_option("--format", a.format, "Number format of the linear layers")
      ->required()
      ->check(CLI::IsMember(names));
  app.add_option("--shard-gb", a.shard_gb, "Begin another file above this size")
      ->check(CLI::Range(0.001, 1000.0))
      ->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    quantize(a);
  } catch (const std::exception& e) {
    fmt::print(stderr, "phalanx quantize: {}\n", e.what());
    return 1;
  }
  return 0;
}

}  // namespace phalanx::apps
