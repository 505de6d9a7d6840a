#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

struct PtxTokenizer;

namespace phalanx::text {

// The tokeniser of a checkpoint: text to ids and back. Immutable; any number of threads may use one
// object at once.
class Tokenizer {
 public:
  // Reads <model_dir>/tokenizer.json. Throws kNotFound (also where only tokenizer.model exists) or
  // kInvalidArgument, naming the file.
  [[nodiscard]] static std::shared_ptr<const Tokenizer> load(const std::string& model_dir);
  // `json` is the content of a tokenizer.json; `where` names it in errors.
  [[nodiscard]] static std::shared_ptr<const Tokenizer> from_json(std::string_view json,
                                                                  std::string_view where);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // Special tokens spelled out in the text become their ids, as in transformers. With
  // add_special_tokens the post-processor adds its own (usually one that begins the sequence); not
  // wanted after a chat template, which writes them itself. Truncation and padding settings of the
  // file are ignored. Throws kInvalidArgument for text that is not UTF-8.
  [[nodiscard]] std::vector<int32_t> encode(std::string_view text, bool add_special_tokens) const;

  // Bytes that form no character become U+FFFD; ids outside the vocabulary yield nothing. For a
  // stream of ids use Detokenizer.
  [[nodiscard]] std::string decode(std::span<const int32_t> ids, bool skip_special_tokens) const;

  // What one token stands for, as in log-probabilities: its bytes (perhaps part of a character),
  // and the same as UTF-8 text with U+FFFD for what is not a character. A word's leading space is
  // kept.
  [[nodiscard]] std::string token_bytes(int32_t id) const;
  [[nodiscard]] std::string token_text(int32_t id) const;

  [[nodiscard]] int64_t vocab_size() const;  // with added tokens
  [[nodiscard]] std::optional<int32_t> token_id(std::string_view token) const;
  [[nodiscard]] bool is_special(int32_t id) const;
  [[nodiscard]] bool has_id(int32_t id) const;

  // For Detokenizer: the decoder only joins token bytes; this token is one byte (<0x0A>) that the
  // decoder joins with its neighbours.
  [[nodiscard]] bool is_byte_level() const;
  [[nodiscard]] bool is_byte_fallback(int32_t id) const;

  // For Grammars. Lives as long as this.
  [[nodiscard]] const PtxTokenizer* handle() const { return handle_; }

 private:
  explicit Tokenizer(PtxTokenizer* handle) : handle_(handle) {}
  PtxTokenizer* handle_;
};

}  // namespace phalanx::text
