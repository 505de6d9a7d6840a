#pragma once

#include "phalanx/text/grammar.h"

namespace phalanx::text {

// The crate's time for one lexeme grows with the square of the repetitions (? * + ~ {) in it, before its
// own bounds look; the terminals of a Lark grammar may double it line by line. Such a lexeme is refused:
// throws Error(kInvalidArgument) with the numbers. What is no proper grammar or schema passes, for the
// crate to refuse. May recurse as deep as the text is long (large_stack.h).
inline constexpr int64_t kMaxRepetitions = 4'000;
inline constexpr int64_t kMaxLexeme = 1 << 20;  // bytes, terminals written out
void check_lexemes(const GrammarSpec& spec);

}  // namespace phalanx::text
