#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace phalanx::text {

// What a GGUF file says about its tokeniser (keys tokenizer.ggml.*).
struct GgufVocabulary {
  std::string model;                // "gpt2": byte-level BPE; "llama": sentencepiece
  std::string pre;                  // how a gpt2 model splits text into words, e.g. "smollm"
  std::vector<std::string> tokens;  // in their stored spelling
  std::vector<int64_t> types;  // 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
  std::vector<double> scores;  // llama only
  std::vector<std::string> merges;  // gpt2 only, "left right"
  std::optional<bool> add_bos;
  std::optional<bool> add_space_prefix;
  std::optional<int64_t> bos_id;
  std::optional<int64_t> unknown_id;
};

// The text of an equivalent tokenizer.json. Throws kInvalidArgument (lists of different lengths, a
// merge of unknown tokens, ...) or kUnimplemented (an unknown model or pre-tokeniser, by name);
// `where` names the file in messages.
[[nodiscard]] std::string tokenizer_json_from_gguf(const GgufVocabulary& vocabulary,
                                                   const std::string& where);

}  // namespace phalanx::text
