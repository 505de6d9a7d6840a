#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "phalanx/text/tokenizer.h"

namespace phalanx::text {

struct DetokenizerOptions {
  bool skip_special_tokens = true;
};

// Turns a stream of ids into text as it comes. Every piece is valid UTF-8 and never holds half a
// character; all pieces together equal Tokenizer::decode of all ids, whatever they are. So byte
// tokens
// (<0xE4>) of a byte-fallback tokeniser wait for the end of their run, whose later bytes may make
// all of it invalid. Not thread-safe.
class Detokenizer {
 public:
  explicit Detokenizer(std::shared_ptr<const Tokenizer> tokenizer, DetokenizerOptions options = {});

  // The text that this id decides; may be empty. Its work does not grow with the ids that
  // came before.
  [[nodiscard]] std::string push(int32_t id);
  // What was held back, at the end of the stream.
  [[nodiscard]] std::string flush();

 private:
  std::string take_window(bool at_end);

  std::shared_ptr<const Tokenizer> tokenizer_;
  DetokenizerOptions options_;
  bool byte_level_;
  std::string pending_;  // byte level: bytes that may become a character
  // Otherwise ids_[0, read_) are the context of ids_[read_, end), whose text has not been given.
  // The context makes rules about the first word's space apply to both alike.
  std::vector<int32_t> ids_;
  size_t read_ = 0;
};

}  // namespace phalanx::text
