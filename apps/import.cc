#include "apps/import.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "apps/new_directory.h"
#include "phalanx/base/error.h"
#include "phalanx/base/progress.h"
#include "phalanx/text/gguf_tokenizer.h"
#include "phalanx/text/tokenizer.h"
#include "phalanx/weights/gguf.h"
#include "phalanx/weights/gguf_llama.h"
#include "phalanx/weights/safetensors_writer.h"

namespace phalanx::apps {
namespace {

using nlohmann::ordered_json;
namespace fs = std::filesystem;

struct ImportOptions {
  std::string model;
  std::string out_dir;
  std::string dtype = "bf16";
  std::string pre_tokenizer;
  double shard_gb = 4.0;
};

std::optional<int64_t> optional_id(const weights::GgufFile& file, const std::string& key) {
  if (!file.has(key)) return std::nullopt;
  return file.integer(key);
}

std::optional<bool> optional_flag(const weights::GgufFile& file, const std::string& key) {
  if (!file.has(key)) return std::nullopt;
  return file.integer(key) != 0;
}

text::GgufVocabulary read_vocabulary(const weights::GgufFile& file,
                                     const std::string& pre_tokenizer) {
  const std::string prefix = "tokenizer.ggml.";
  text::GgufVocabulary vocabulary{
      .model = file.text(prefix + "model"),
      .pre = pre_tokenizer.empty() ? file.text(prefix + "pre", "") : pre_tokenizer,
      .tokens = file.texts(prefix + "tokens"),
      .types = file.integers(prefix + "token_type"),
      .scores = file.numbers(prefix + "scores"),
      .merges = file.texts(prefix + "merges"),
      .add_bos = optional_flag(file, prefix + "add_bos_token"),
      .add_space_prefix = optional_flag(file, prefix + "add_space_prefix"),
      .bos_id = optional_id(file, prefix + "bos_token_id"),
      .unknown_id = optional_id(file, prefix + "unknown_token_id")};
  // Sentencepiece models have 0 there where nothing is said.
  if (vocabulary.model == "llama" && !vocabulary.unknown_id) vocabulary.unknown_id = 0;
  if (vocabulary.model == "llama" && !vocabulary.bos_id) vocabulary.bos_id = 1;
  return vocabulary;
}

std::string tokenizer_config(const weights::GgufFile& file, const text::GgufVocabulary& vocabulary,
                             int64_t context_length) {
  ordered_json out;
  ordered_json additional = ordered_json::array();
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id)
    if (vocabulary.types[id] == 3) additional.push_back(vocabulary.tokens[id]);
  for (const auto& [name, key] : {std::pair{"bos_token", "bos"},
                                  {"eos_token", "eos"},
                                  {"pad_token", "padding"},
                                  {"unk_token", "unknown"}}) {
    const std::string full = fmt::format("tokenizer.ggml.{}_token_id", key);
    const auto id = optional_id(file, full);
    if (!id) continue;
    if (*id < 0 || *id >= static_cast<int64_t>(vocabulary.tokens.size()))
      throw Error(Code::kInvalidArgument,
                  fmt::format("{}: {}: found {}, expected 0 to {}", file.path(), full, *id,
                              vocabulary.tokens.size() - 1));
    out[name] = vocabulary.tokens[static_cast<size_t>(*id)];
  }
  out["additional_special_tokens"] = additional;
  const std::string single = file.text("tokenizer.chat_template", "");
  ordered_json templates = ordered_json::array();
  for (const std::string& name : file.texts("tokenizer.chat_templates"))
    templates.push_back(
        {{"name", name}, {"template", file.text("tokenizer.chat_template." + name)}});
  if (!single.empty() && templates.empty()) {
    out["chat_template"] = single;
  } else if (!single.empty()) {
    templates.push_back({{"name", "default"}, {"template", single}});
    out["chat_template"] = templates;
  }
  out["clean_up_tokenization_spaces"] = false;
  out["model_max_length"] = context_length;
  out["tokenizer_class"] = "PreTrainedTokenizerFast";
  return out.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

void import_gguf(const ImportOptions& options) {
  const auto file = weights::GgufFile::open(options.model);
  const auto dtype = options.dtype == "f32"   ? tensor::DType::kF32
                     : options.dtype == "f16" ? tensor::DType::kF16
                                              : tensor::DType::kBF16;
  const weights::GgufLlama model(file, dtype);
  const auto vocabulary = read_vocabulary(file, options.pre_tokenizer);
  const std::string tokenizer = text::tokenizer_json_from_gguf(vocabulary, options.model);
  // Reads what it wrote, so that a tokenizer that cannot work ends here.
  (void)text::Tokenizer::from_json(tokenizer, options.model + " (as tokenizer.json)");
  const std::string config = tokenizer_config(file, vocabulary, model.context_length());

  NewDirectory dir(options.out_dir);
  const auto write = [&](const char* name, const std::string& content) {
    weights::write_file(dir.part() + "/" + name, content);
  };
  write("config.json", model.config_json());
  write("generation_config.json", model.generation_config_json());
  write("tokenizer.json", tokenizer);
  write("tokenizer_config.json", config);
  int64_t total = 0;
  for (const auto& entry : model.entries()) total += entry.bytes();
  Progress progress(fmt::format("importing {}", fs::path(options.model).filename().string()), total,
                    ProgressUnit::kBytes);
  model.write_weights(dir.part(), static_cast<int64_t>(options.shard_gb * 1e9),
                      [&](int64_t n) { progress.advance(n); });
  dir.finish();
  progress.done();
}

}  // namespace

int import_main(int argc, char** argv) {
  ImportOptions options;
  CLI::App app("Turns a GGUF file (llama or qwen2) into a checkpoint directory", "phalanx import");
  app.add_option("model", options.model, "GGUF file")->required();
  app.add_option("out_dir", options.out_dir, "Directory to make; must not exist or be empty")
      ->required();
  app.add_option("--dtype", options.dtype, "Type of the weights")
      ->check(CLI::IsMember({"bf16", "f16", "f32"}))
      ->capture_default_str();
  app.add_option("--shard-gb", options.shard_gb, "Begin another file above this size")
      ->check(CLI::Range(0.001, 1000.0))
      ->capture_default_str();
  app.add_option("--pre-tokenizer", options.pre_tokenizer,
                 "Rule that splits text into words, where the file names none or an unknown one");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    import_gguf(options);
  } catch (const std::exception& e) {
    fmt::print(stderr, "phalanx import: {}\n", e.what());
    return 1;
  }
  return 0;
}

}  // namespace phalanx::apps
