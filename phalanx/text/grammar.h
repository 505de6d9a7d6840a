#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "phalanx/text/tokenizer.h"

struct PtxGrammars;

namespace phalanx::text {

// A structure that a text must have.
struct GrammarSpec {
  enum class Kind { kJsonObject, kJsonSchema, kRegex, kLark, kChoice };
  Kind kind = Kind::kJsonObject;
  std::string text;  // JSON schema, regular expression, Lark grammar, JSON array of texts
};

// One sequence's place in a grammar. One user at a time; different ones are independent.
class GrammarWalker {
 public:
  virtual ~GrammarWalker() = default;
  // Bit i % 32 of word i / 32: token i may come next. At the end of the grammar only the end tokens
  // may. Throws Error(kInvalidArgument) when the grammar is too large for one step.
  virtual void mask(std::span<uint32_t> out) = 0;
  // Throws kInvalidArgument if the grammar does not allow `token`.
  virtual void accept(int32_t token) = 0;
  // Nothing but an end token may come any more.
  [[nodiscard]] virtual bool ended() const = 0;
  // Another walker at the same place.
  [[nodiscard]] virtual std::unique_ptr<GrammarWalker> clone() const = 0;
};

// Compiles grammars for one tokeniser, with llguidance. Immutable; any number of threads.
class Grammars {
 public:
  // `vocab`: ids that the model's logits have; `end_tokens`: what may end a text. Takes the time to
  // sort the vocabulary once. Throws kInvalidArgument.
  Grammars(const Tokenizer& tokenizer, int64_t vocab, std::span<const int32_t> end_tokens);
  ~Grammars();
  Grammars(const Grammars&) = delete;
  Grammars& operator=(const Grammars&) = delete;
  // Throws kInvalidArgument with what is wrong with the grammar. Work is bounded (well under 1 s).
  [[nodiscard]] std::unique_ptr<GrammarWalker> compile(const GrammarSpec& spec) const;

 private:
  PtxGrammars* handle_ = nullptr;
};

// "json_schema", "regex", …
[[nodiscard]] const char* kind_name(GrammarSpec::Kind kind);

}  // namespace phalanx::text
